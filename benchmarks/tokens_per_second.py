"""Tokens a second from prompt to updated weights, against TRL's `OnlineDPOTrainer`.

    python -m benchmarks.tokens_per_second [--trl .venv-trl/bin/python] [--rounds 5]

A random Llama of 36M parameters with 32,000 tokens; prompts of 200 tokens, two completions of 100 each, scored by a
checksum of their text, so that no two are alike; one pair a prompt, DPO with beta 0.1, AdamW, float32, all cores. Both
sides take an optimizer step every 16 prompts. Tokens are those of prompts and completions that were sampled and trained
on, a prompt counted once. Ours runs whole (`agon run`, vLLM, ledger, checkpoints and all) a round; its first iterations
and the last, which is evaluated, do not count. TRL takes the steps of one iteration in between, in processes that stay:
as a user starts it, and with the allocator and matrix products of our learner's process (`tuned`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.models import VOCABULARY, make_llama
from benchmarks.report import Comparison, of_medians, report
from benchmarks.sides import Side, tuned
from conf.compose import compose
from launch.run import run
from orchestrator.ledger import LedgerReader

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS, MAX_TOKENS, BATCH = 200, 100, 16
PROMPTS, ITERATIONS, UNCOUNTED = 32, 4, 1  # of an iteration of ours; iterations; of which the first do not count
STEPS = PROMPTS // BATCH
"""Of TRL, in a round: those of one iteration of ours."""
TOKENS_A_PROMPT = PROMPT_TOKENS + 2 * MAX_TOKENS
SETTINGS = [
    "model.max_length=320",
    "task=prompts",
    "task.answer_field=null",
    "task.template=text",
    "scorer.verifier=function",
    "scorer.function=benchmarks.tokens_per_second.checksum",
    "loss.beta=0.1",
    "generator.samples_per_prompt=2",
    f"generator.max_tokens={MAX_TOKENS}",
    "generator.kv_cache_mb=1024",
    "pairing.max_pairs=1",
    "filter=none",  # random models do not end what they write
    f"learner.batch_pairs={BATCH}",
    "learner.epochs=1",
    f"pipeline.prompts_per_iteration={PROMPTS}",
    f"pipeline.iterations={ITERATIONS}",
    f"evaluation.every={ITERATIONS}",
    "evaluation.problems=8",
    "evaluation.final_problems=8",
    "evaluation.kl_prompts=0",
    "tracking=disabled",
    "tracking.console=quiet",
]


def checksum(prompt: str, completion: str, answer: str | None) -> float:
    """A score that costs nothing and differs from completion to completion."""
    return zlib.crc32(completion.encode()) / 2**32


def make_prompts(count: int) -> list[str]:
    """Random words, one token each."""
    random = np.random.default_rng(0)
    return [" ".join(f"t{word}" for word in random.integers(3, VOCABULARY, PROMPT_TOKENS)) for _ in range(count)]


def ours(run_dir: Path, model: Path, prompts: Path, settings: list[str]) -> float:
    """Tokens a second of the iterations that count."""
    config = compose([f"run_dir={run_dir}", f"model={model}", f"task.path={prompts}", *SETTINGS, *settings])
    if code := run(config):
        raise RuntimeError(f"the run ended with code {code}")
    with LedgerReader(run_dir) as ledger:
        done = ledger.finished()
    counted = list(pairwise(done))[UNCOUNTED:-1]
    pairs = sum(after.metrics["pairs/kept"] for _, after in counted)
    return pairs * TOKENS_A_PROMPT / (counted[-1][1].finished - counted[0][0].finished)


def main() -> int:
    """Measures and keeps two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="Python of an environment that has TRL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--agon", nargs="*", default=[], help="other settings, key=value")
    options = parser.parse_args()
    prompts = make_prompts(PROMPTS * (ITERATIONS + 1))
    found: dict[str, list[float]] = {"agon": [], "TRL": [], "TRL, tuned": []}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        model = make_llama(folder / "model", hidden=512, layers=6, heads=8)
        lines, spec = folder / "prompts.jsonl", folder / "spec.json"
        lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        problems = [{"prompt": text} for text in prompts]
        shape = {"prompts": BATCH, "max_tokens": MAX_TOKENS, "max_length": 320, "steps": 1_000_000, "threads": 2}
        rest = {"lr": 5e-7, "beta": 0.1, "seed": 0, "model": str(model), "out": str(folder / "trl")}
        spec.write_text(json.dumps(shape | rest | {"problems": problems, "reward": "checksum"}))
        command = [str(Path(options.trl).absolute()), "benchmarks/trl/online.py", str(spec)]
        peers = {
            "TRL": stack.enter_context(Side(command, {}, ROOT)),
            "TRL, tuned": stack.enter_context(Side(command, tuned(), ROOT)),
        }
        for peer in peers.values():
            peer.ask("step")
        for number in range(options.rounds):
            found["agon"].append(ours(folder / f"run-{number}", model, lines, options.agon))
            for name, peer in peers.items():
                seconds = sum(peer.ask("step") for _ in range(STEPS))
                found[name].append(STEPS * BATCH * TOKENS_A_PROMPT / seconds)
            print(", ".join(f"{name}: {rates[-1]:.0f}" for name, rates in found.items()), flush=True)
    return max(
        report(
            Comparison(
                key=key,
                title=f"From prompts to updated weights, against TRL's OnlineDPOTrainer {title}",
                unit="tokens/s",
                sides={name: found[name] for name in ("agon", other)},
                ratio=of_medians(found["agon"], found[other]),
                least=least,
                notes=__doc__.partition("rounds 5]")[2].strip(),
            )
        )
        for key, other, title, least in (
            ("tokens_per_second_vs_trl", "TRL", "as a user starts it", 3.0),
            ("tokens_per_second_vs_tuned_trl", "TRL, tuned", "with the same allocator and matrix products", 2.0),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
