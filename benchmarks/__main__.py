"""All benchmarks, one after the other, or those that are named: ``python -m benchmarks [queue_bandwidth ...]``.

Each prints its table, keeps its ratio in `results.json` and its section in `RESULTS.md`. The exit code says whether all
ratios are as they should be. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SCRIPTS = (
    *("queue_bandwidth", "publication", "generation", "overlap", "growth", "search"),
    *("gemm_share", "learner_vs_trl", "tokens_per_second", "time_to_accuracy", "start_up"),
    *("logprob_memory", "learner_throughput", "compiled_layers"),
)


def main() -> int:
    """Runs them, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", help=f"of {', '.join(SCRIPTS)}; all if none is named")
    failed = []
    for script in parser.parse_args().scripts or SCRIPTS:
        print(f"== {script}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{script}"], check=False).returncode:
            failed.append(script)
    print(f"not as it should be: {', '.join(failed)}" if failed else "all ratios are as they should be")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
