"""Dependencies run one way, and what should be light is light."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("conf", "orchestrator", "actors", "learners", "launch")

# Lower layers first; within a layer modules may use each other. The first match counts.
LAYERS = [
    ("records", ["conf.schema", "conf.objectives", "orchestrator.types", "orchestrator.errors", "orchestrator.seeds"]),
    (
        "pure logic",
        [
            *("conf*", "orchestrator.tasks*", "orchestrator.prompts", "orchestrator.pairing", "orchestrator.filters"),
            *("orchestrator.batching", "orchestrator.metrics", "orchestrator.files", "orchestrator.judging"),
            *("orchestrator.tally", "orchestrator.events", "orchestrator.waits", "orchestrator.printable"),
            *("orchestrator.disk", "orchestrator.processes"),
            *("actors.judges*", "actors.sandbox*", "actors.search*", "actors.engine"),
            *("learners.preference*", "learners.loading", "learners.products", "learners.schedule"),
        ],
    ),
    (
        "transports",
        [
            *("orchestrator.remote", "orchestrator.queues", "orchestrator.pools", "orchestrator.weights"),
            *("orchestrator.dispatch", "orchestrator.slots", "orchestrator.stacks", "orchestrator.startup"),
            "orchestrator.pace",
            "orchestrator.blame",
            "orchestrator.speculation",
            *("orchestrator.shared_memory", "orchestrator.spans"),
            *("orchestrator.store", "orchestrator.connection", "orchestrator.ledger*", "orchestrator.tracking"),
            "orchestrator.summary",
            *("orchestrator.accounts", "orchestrator.archive"),
        ],
    ),
    ("roles", ["actors*", "learners*"]),
    ("control", ["orchestrator*"]),
    ("launch", ["launch*"]),
]

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def layer_of(module):
    return next(i for i, (_, patterns) in enumerate(LAYERS) if any(fnmatch(module, p) for p in patterns))


def imports_of(path):
    """Project modules imported at run time: those for type checkers only do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in full)


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_run_one_way(module):
    found = {name for name in imports_of(MODULES[module]) if name in MODULES}
    wrong = {name for name in found if layer_of(name) > layer_of(module)}
    assert not wrong, f"{module} ({LAYERS[layer_of(module)][0]}) imports from above: {sorted(wrong)}"


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module", ["orchestrator.types", "orchestrator.errors", "conf.schema", "launch.cli", "launch.resuming"]
)
def test_light_modules_load_nothing_heavy(module):
    heavy = ("ray", "torch", "vllm", "transformers", "wandb")
    result = run(f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_controller_computes_nothing_itself():
    """So it starts the others seconds earlier, and takes little memory beside them."""
    heavy = ("torch", "vllm", "transformers")
    modules = "launch.run, launch.wiring, orchestrator.controller"
    result = run(f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_learners_run_where_ray_and_vllm_are_absent():
    modules = [name for name in MODULES if name.startswith("learners") and name != "learners.learner"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("ray", "vllm", "wandb", "hydra")))
import {", ".join(modules)}
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_every_module_imports():
    code = f"import {', '.join(name for name in MODULES if name != 'launch.__main__')}"
    result = run(code)
    assert result.returncode == 0, result.stderr
