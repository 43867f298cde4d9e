"""The learner against TRL's `DPOTrainer` on the same pairs, with the same model, reference, loss, optimizer and dtype.

    python -m benchmarks.learner_vs_trl [--trl .venv-trl/bin/python] [--repetitions 5]

A random Llama of 36M parameters with 32,000 tokens, 8 prompts of 256 tokens with one pair each of completions of 64 to
256, float32, two threads. A step is what both do with a batch: reference forward pass, forward, backward, clip, AdamW.
Tokens are unique ones: a prompt is counted once, whatever a side computes twice. Ours accumulates micro-batches of
1,280 tokens (two pairs, few enough for their logits to be kept), TRL batches of two pairs, its fastest, without
gradient checkpointing, as a user starts it and with the allocator and matrix products of our learner's process
(`tuned`). Memory is the peak within a step above what the process holds between steps, once with layers stored and once
with layers recomputed in the backward pass on both sides; the ratio is the worse of the two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from benchmarks.models import VOCABULARY, make_llama
from benchmarks.report import Comparison, in_turn, of_medians, report
from benchmarks.sides import Side, tuned
from launch.environment import KEEPS_MEMORY

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers")
PAIRS = 8
COMMON = {
    "lr": 1e-7,
    "beta": 0.1,
    "max_grad_norm": 1e9,
    "threads": 2,
    "vocabulary": VOCABULARY,
    "micro_batch_tokens": 1280,
    "trl_batch": 2,
}
"""What each side is told, beside model and pairs."""


def make_model(folder: Path) -> Path:
    """The model that both train."""
    return make_llama(folder, hidden=512, layers=6, heads=8)


def make_pairs() -> list[dict[str, list[int]]]:
    """Random tokens; a completion gets its end of sequence from each side's own code."""
    random = np.random.default_rng(0)

    def tokens(length: int) -> list[int]:
        return [int(token) for token in random.integers(3, VOCABULARY, length)]

    def completion() -> list[int]:
        return tokens(int(random.integers(63, 256)))

    return [{"prompt": tokens(256), "chosen": completion(), "rejected": completion()} for _ in range(PAIRS)]


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of two sets of gradients, relative to the largest entry of each tensor."""
    mine, other = load_file(ours), load_file(theirs)
    assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
    return max(float(np.abs(mine[name] - other[name]).max() / np.abs(other[name]).max()) for name in mine)


def comparisons(rates: Mapping[str, list[float]], memory: Mapping[str, list[float]], notes: str) -> list[Comparison]:
    """Of unique tokens/s with both starts of TRL, and of MiB."""
    speed = [
        Comparison(
            key=key,
            title=f"A learner's step against TRL's DPOTrainer {title}",
            unit="unique tokens/s",
            sides={name: rates[name] for name in ("agon", other)},
            ratio=of_medians(rates["agon"], rates[other]),
            least=least,
            notes=notes,
        )
        for key, other, title, least in (
            ("learner_tokens_vs_trl", "TRL", "as a user starts it", 3.5),
            ("learner_tokens_vs_tuned_trl", "TRL, tuned", "with the same allocator and matrix products", 2.5),
        )
    ]
    peak = Comparison(
        key="learner_memory_vs_trl",
        title="Peak memory of a learner's step against TRL's DPOTrainer",
        unit="MiB",
        sides=memory,
        ratio=max(of_medians(memory[f"agon{way}"], memory[f"TRL{way}"]) for way in ("", ", checkpointing")),
        most=0.4,
        notes=notes,
    )
    return [*speed, peak]


def main() -> int:
    """Measures and keeps three ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="Python of an environment that has TRL")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    pairs = make_pairs()
    tokens = sum(len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) + 2 for pair in pairs)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        told = COMMON | {"pairs": pairs, "model": str(make_model(folder / "model")), "folder": str(folder / "out")}
        spec, frugal = folder / "spec.json", folder / "frugal.json"
        spec.write_text(json.dumps(told))
        frugal.write_text(json.dumps(told | {"checkpointing": True}))
        trl = [str(Path(arguments.trl).absolute()), "benchmarks/trl/dpo.py"]
        ours = [sys.executable, "-m", "benchmarks.learner_side"]
        sides = {
            "agon": stack.enter_context(Side([*ours, str(spec)], KEEPS_MEMORY, ROOT)),
            "TRL": stack.enter_context(Side([*trl, str(spec)], {}, ROOT)),
            "TRL, tuned": stack.enter_context(Side([*trl, str(spec)], tuned(), ROOT)),
        }
        for name in ("agon", "TRL"):
            sides[name].ask(f"gradients {folder / name}")
        difference = largest_difference(folder / "agon", folder / "TRL")
        seconds = in_turn({name: partial(side.ask, "step") for name, side in sides.items()}, arguments.repetitions)
        del sides["TRL, tuned"]
        sides["agon, checkpointing"] = stack.enter_context(Side([*ours, str(frugal)], KEEPS_MEMORY, ROOT))
        sides["TRL, checkpointing"] = stack.enter_context(Side([*trl, str(frugal)], {}, ROOT))
        memory = in_turn({name: partial(side.ask, "memory") for name, side in sides.items()}, arguments.repetitions)
    rates = {name: [tokens / value for value in values] for name, values in seconds.items()}
    what = __doc__.partition("repetitions 5]")[2].strip()
    notes = (
        f"{what} {tokens:,} unique tokens a step; gradients differ by {difference:.1e} of each tensor's largest entry."
    )
    found = comparisons(rates, memory, notes)
    if difference > 1e-5:
        print(f"gradients differ by {difference:.1e}: more than 1e-5")
    return max([report(one, packages=PACKAGES) for one in found] + [int(difference > 1e-5)])


if __name__ == "__main__":
    sys.exit(main())
