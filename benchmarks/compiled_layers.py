"""Whether `torch.compile` pays in the learner: steps with compiled norms and MLPs against steps without.

    python -m benchmarks.compiled_layers

The same model (a Llama with random weights), batches whose shapes differ from step to step as they do in training, the
step's first run apart from the others: that is when the compiler works. Attention is left out: it is made of few large
products and, on CPUs, of loops over the prompts of a batch, for each of which there would be a program of its own.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from benchmarks.learner_throughput import make_batch, make_policy, options, timed_step
from benchmarks.report import Comparison, of_medians, report
from conf.schema import LearnerConfig
from learners.products import use_fastest_products

SHAPE = ["--hidden=384", "--intermediate=1024", "--layers=8", "--heads=6", "--kv-heads=6"]
STEPS = 6


def main() -> int:
    """Times both in turn."""
    arguments = options().parse_args([*SHAPE, *sys.argv[1:]])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(arguments.threads)
        use_fastest_products()
    plain = make_policy(arguments, device)
    compiled = copy.deepcopy(plain)
    model: Any = compiled.model
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            module.compile(dynamic=True)
    learner = LearnerConfig(micro_batch_tokens=arguments.micro_batch_tokens)
    sides = {"plain": plain, "compiled": compiled}
    optimizers = {name: torch.optim.AdamW(policy.parameters(), lr=1e-7) for name, policy in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(STEPS + 2):
        arguments.prompt_length += 13
        batch = make_batch(arguments, seed=number)
        for name, policy in sides.items():
            seconds[name].append(timed_step(policy, optimizers[name], batch, learner)[0])
    plainly, once = seconds["plain"], seconds["compiled"]
    what = (__doc__ or "").partition("layers\n\n")[2].strip()
    rest = {name: times[2:] for name, times in seconds.items()}  # dynamic shapes are compiled at the second one
    return report(
        Comparison(
            key="compiled_layers",
            title="torch.compile in the learner's step",
            unit="s a step",
            sides=rest,
            ratio=of_medians(plainly[2:], once[2:]),
            notes=f"{what} First steps: plain {plainly[0]:.1f} s, compiled {once[0]:.1f} s.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
