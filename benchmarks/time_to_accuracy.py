"""Wall time until the policy is right in 70 % of its samples, against TRL's `OnlineDPOTrainer`.

    python -m benchmarks.time_to_accuracy [--trl .venv-trl/bin/python] [--seeds 0 1 2] [--draws 3]

The embedded task (column addition): both begin with the same warm-started Llama of 0.8M parameters and train on the
same stream of problems, in its order, with the same verifier, in float32, on all cores. The clock starts with the
process: imports, actors and engines are included. Weights are put aside as they come, and each is tried afterwards on
1,024 fresh test problems, two samples each at temperature 1; between two of them accuracy is taken to be linear.

The ratio is to TRL with the best settings of its trainer; `--sides "TRL, tuned"` gives it our allocator and matrix
products. What agon learns from is mostly the likelihood of right answers: DPO with so small a beta weighs a hundredth
of it. TRL's trainer has no such term. In which order a trainer sees its problems moves its time by a third, so that
each seed's model is trained on several draws of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from actors.transformers_engine import TransformersEngine
from benchmarks.report import Comparison, of_medians, report
from benchmarks.sides import tuned
from conf.schema import ModelConfig, TinyConfig
from launch.export import export
from launch.initial_model import ensure_tiny_model
from orchestrator.ledger import LedgerReader
from orchestrator.tasks.addition import AdditionTask
from orchestrator.types import FinishReason, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
TARGET, PROBLEMS, SAMPLES, MAX_TOKENS = 0.70, 1024, 2, 48
SIDES = ("agon", "TRL")
LIMIT_S = 600.0
AGON = [
    *("evaluation.scorer=none", "tracking=disabled", "tracking.console=quiet", "pipeline.keep_checkpoints=1000"),
    *("pipeline.iterations=24", "pipeline.prompts_per_iteration=64", "generator.samples_per_prompt=4"),
    *("pairing.max_pairs=2", "loss.beta=0.0003", "loss.sft_weight=1.0"),
    *("learner.lr=1.5e-4", "learner.adam_beta1=0.8", "learner.adam_beta2=0.98"),
    *("learner.batch_pairs=8", "learner.warmup_steps=0", "learner.num_threads=1"),
    *("generator=transformers", "generator.num_actors=2", "cluster.num_cpus=4"),
]
"""The best settings found, as for TRL."""
TRL = {
    "prompts": 32,
    "lr": 1e-4,
    "beta": 0.3,
    "adam_betas": [0.9, 0.999],
    "steps": 250,
    "save_every": 5,
    "threads": 2,
    "max_tokens": MAX_TOKENS,
}
"""Where `--peer` says nothing else."""
STAGES = ("collect", "train", "publish", "settle")
"""Of an iteration."""


def run_agon(
    seed: int, order: int, model: Path, folder: Path, settings: Sequence[str], spent: dict[str, list[float]]
) -> list[tuple[float, Path]]:
    """Seconds and weights of each iteration. Adds to `spent` what the start and each iteration's stages took."""
    start, run_dir = time.time(), folder / "run"
    command = [sys.executable, "-m", "launch", "run", f"model.tiny.seed={seed}", f"seed={order}", f"run_dir={run_dir}"]
    command += [*AGON, *settings]
    subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT_S)
    with LedgerReader(run_dir) as ledger:
        zeroth, *done = ledger.finished()
    exported = [export(run_dir, folder / f"iteration-{one.iteration}", one.iteration) for one in done]
    spent.setdefault("start", []).append(zeroth.finished - start)
    spent.setdefault("iteration", []).extend(after.finished - before.finished for before, after in pairwise(done))
    for stage in STAGES:
        spent.setdefault(stage, []).extend(one.metrics[f"time/{stage}_s"] for one in done)
    return [(0.0, model), *((one.finished - start, path) for one, path in zip(done, exported, strict=True))]


def run_trl(
    order: int, model: Path, folder: Path, python: str, settings: dict[str, object], environment: dict[str, str]
) -> list[tuple[float, Path]]:
    """Seconds and weights of every few steps."""
    count = int(str(settings["prompts"])) * int(str(settings["steps"]))
    bos = AutoTokenizer.from_pretrained(model).bos_token  # TRL adds no special tokens to a text
    train = islice(AdditionTask(seed=order).train(cursor=0), count)
    problems = [{"prompt": f"{bos}{one.content}", "answer": one.answer} for one in train]
    out, spec = folder / "trl", folder / "spec.json"
    rest = {"seed": order, "model": str(model), "out": str(out), "problems": problems, "max_length": 128}
    start = time.time()
    spec.write_text(json.dumps({**settings, **rest, "start": start}))
    command = [str(Path(python).absolute()), "benchmarks/trl/online.py", str(spec)]
    environment = os.environ | environment
    subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL, env=environment)
    saved = sorted((float(path.name), path) for path in out.iterdir() if (path / "model.safetensors").exists())
    return [(0.0, model), *saved]


def sampled_accuracy(folder: Path) -> float:
    """Share of right answers, `SAMPLES` to each problem. Settings were compared on the `PROBLEMS` before these."""
    problems = AdditionTask().test(2 * PROBLEMS)[PROBLEMS:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = TransformersEngine(
        model_dir=str(folder),
        dtype="float32",
        max_length=128,
        max_num_seqs=512,
        kv_cache_mb=512,
        gpu_memory_utilization=0.9,
        tensor_parallel_size=1,
        seed=0,
    )
    sampling = SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS)
    answers = {f"{number}/{sample}": one.answer for number, one in enumerate(problems) for sample in range(SAMPLES)}
    prompts = [tuple(tokenizer(one.content).input_ids) for one in problems for _ in range(SAMPLES)]
    for number, (name, prompt) in enumerate(zip(answers, prompts, strict=True)):
        engine.add(GenerationRequest(id=name, prompt_token_ids=prompt, sampling=sampling, seed=number))
    right = 0
    while engine.has_unfinished():
        for output in engine.step():
            ended = output.finish_reason is FinishReason.EOS
            right += ended and output.text.rpartition("#")[2] == answers[output.request_id]
    return right / len(answers)


def reached(weights: Sequence[tuple[float, Path]]) -> tuple[float, list[tuple[float, float]]]:
    """When accuracy was `TARGET`, infinite where it never was, and accuracy by seconds."""
    curve: list[tuple[float, float]] = []
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        accuracies = [pool.submit(sampled_accuracy, folder) for _, folder in weights]
        for (seconds, _), accuracy in zip(weights, accuracies, strict=True):
            curve.append((seconds, accuracy.result()))
            if curve[-1][1] >= TARGET:
                break
        pool.shutdown(cancel_futures=True)
    for (before, low), (after, high) in pairwise(curve):
        if low < TARGET <= high:
            return before + (after - before) * (TARGET - low) / (high - low), curve
    return float("inf"), curve


def main() -> int:
    """Measures and keeps the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="Python of an environment that has TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the model that both start from")
    parser.add_argument("--draws", type=int, default=3, help="orders of the problems, to each seed")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=(*SIDES, "TRL, tuned"))
    parser.add_argument("--agon", nargs="*", default=[], help="other settings, key=value")
    parser.add_argument("--peer", type=json.loads, default={}, help="other settings of TRL, JSON")
    options = parser.parse_args()
    found: dict[str, list[float]] = {side: [] for side in options.sides}
    spent: dict[str, list[float]] = {}
    for draw in range(options.draws):
        for seed in options.seeds:
            model = ensure_tiny_model(ModelConfig(tiny=TinyConfig(seed=seed)), AdditionTask())
            order = 100 * draw + seed
            for side in options.sides[:: 1 if (draw + seed) % 2 else -1]:  # each comes first in its turn
                with tempfile.TemporaryDirectory() as temporary:
                    folder = Path(temporary)
                    if side == "agon":
                        weights = run_agon(seed, order, model, folder, options.agon, spent)
                    else:
                        environment = tuned() if side == "TRL, tuned" else {}
                        weights = run_trl(order, model, folder, options.trl, TRL | options.peer, environment)
                    seconds, curve = reached(weights)
                found[side].append(seconds)
                learned = (f"{at:.1f} s {rate:.3f}" for at, rate in curve)
                print(f"{side}, seed {seed}, order {order}: {seconds:.1f} s; {', '.join(learned)}", flush=True)
    if set(options.sides) != set(SIDES):
        return 0
    what = __doc__.partition("draws 3]")[2].strip()
    count = len(options.seeds)
    by_seed = [of_medians(found["TRL"][at::count], found["agon"][at::count]) for at in range(count)]
    each = ", ".join(f"{ratio:.2f}" for ratio in by_seed)
    time_of = ", ".join(f"{part} {statistics.median(values):.2f}" for part, values in spent.items())
    return report(
        Comparison(
            key="time_to_accuracy_vs_trl",
            title="Wall time to 70 % sampled accuracy, against TRL",
            unit="s",
            sides=found,
            ratio=of_medians(found["TRL"], found["agon"]),
            least=3.0,
            notes=(
                f"{what} By seed: {each}. agon's seconds, medians: {time_of}."
                f"\n\nagon: `{' '.join(AGON)}`. TRL: `{TRL}`."
            ),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
