"""Share of a learner's step that its matrix products would take alone.

    python -m benchmarks.gemm_share [--repetitions 5]

The model, pairs and step of `learner_vs_trl`, against bare products of the same shapes, strides and number in the same
process, with factors that are there already and results that are written over. Attention counts as far as
it is made of products, which it is on CPUs (`learners/cpu_attention.py`); its softmax does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.learner_vs_trl import COMMON, PACKAGES, ROOT, make_model, make_pairs
from benchmarks.report import Comparison, in_turn, of_medians, report
from benchmarks.sides import Side
from launch.environment import KEEPS_MEMORY


def main() -> int:
    """Measures and keeps the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = folder / "spec.json"
        spec.write_text(json.dumps(COMMON | {"pairs": make_pairs(), "model": str(make_model(folder / "model"))}))
        command = [sys.executable, "-m", "benchmarks.learner_side", str(spec)]
        with Side(command, KEEPS_MEMORY, ROOT) as side:
            asked = {"products alone": partial(side.ask, "products"), "whole step": partial(side.ask, "step")}
            seconds = in_turn(asked, repetitions)
    share = Comparison(
        key="gemm_share",
        title="Share of a learner's step that its matrix products would take alone",
        unit="s",
        sides=seconds,
        ratio=of_medians(seconds["products alone"], seconds["whole step"]),
        least=0.6,
        notes=__doc__.partition("repetitions 5]")[2].strip(),
    )
    return report(share, packages=PACKAGES)


if __name__ == "__main__":
    sys.exit(main())
