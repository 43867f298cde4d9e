"""`python -m tests.chaos.nodes`: a Ray cluster in a process of its own; prints its address, and ends with its input.

It has a head without room for actors and two nodes with room for all of them, each known to the saboteur.
"""

from __future__ import annotations

import logging
import sys

from ray.cluster_utils import Cluster

from tests.chaos.saboteur import register

_ROOM = {"num_cpus": 4, "object_store_memory": 128 << 20}
_HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
"""Ray's own takes some 14 s to miss a node."""


def main() -> None:
    """Runs until standard input ends."""
    logging.getLogger("ray").setLevel(logging.WARNING)  # each cluster tells of the one before it
    head = {**_ROOM, "num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for name in ("a", "b"):
            (raylet,) = cluster.add_node(**_ROOM).all_processes["raylet"]
            register("node", name, raylet.process.pid)
        print(cluster.address, flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
