"""What all tests share: no network, no hub, one small Ray."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_MODE": "offline",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
from hypothesis import settings

# The same examples each time: a green tree stays green. `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", print_blob=True, deadline=None)
settings.load_profile("repeatable")


LONGEST_FIRST = ("run", "chaos", "faults", "judged_run", "one_file", "rollback", "audit", "security", "tracking")
"""Modules of whole runs; begun first, so that no worker waits for the last of them."""


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray of the test module's own, with more logical CPUs than the machine may have."""
    import ray

    from launch.placement import is_late
    from orchestrator.waits import forget_everybody

    for tries_left in (2, 1, 0):  # a busy machine may take longer than Ray gives itself, here as in a run
        try:
            ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as error:
            if not (tries_left and is_late(error)):
                raise
    yield
    ray.shutdown()
    forget_everybody()  # the next run of this process does not know these actors


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory):
    """A real run that nothing disturbed, not to be changed; its inputs lie in `../inputs`."""
    from tests.runs import REFERENCE, do_run

    root = tmp_path_factory.mktemp("reference")
    (root / "inputs").mkdir()
    assert do_run(root / "inputs", root / "run", **REFERENCE) == 0
    return root / "run"
