"""The learner of this project on given pairs, one optimizer step a command: what `trl/dpo.py` is for TRL.

python -m benchmarks.learner_side SPEC.json

Each line of stdin is a command, answered with a number:

    step              seconds of an optimizer step
    gradients FILE    the same, and its gradients are written to the file
    memory            highest MiB within a step, above what was held before
    products          seconds of the matrix products of a step, alone
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from benchmarks.products import products_of
from benchmarks.report import seconds
from benchmarks.resident import resident, settle
from conf.schema import LearnerConfig, LossConfig, ReferenceConfig
from learners.trainer import Trainer
from orchestrator.batching import pack
from orchestrator.types import Completion, FinishReason, PolicyVersion, PreferencePair, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = PolicyVersion(number=0, digest="0" * 16)


def completion(ids: list[int]) -> Completion:
    """Of these tokens, closed with the end of a sequence."""
    tokens = (*ids, 1)
    return Completion(
        token_ids=tokens, text="", logprobs=(0.0,) * len(tokens), finish_reason=FinishReason.EOS, policy=VERSION
    )


def make_trainer(spec: dict[str, Any]) -> Trainer:
    """The learner that the specification describes."""
    return Trainer(
        spec["model"],
        loss=LossConfig(beta=spec["beta"]),
        reference=ReferenceConfig(kind="initial"),
        learner=LearnerConfig(
            lr=spec["lr"],
            max_grad_norm=spec["max_grad_norm"],
            num_threads=spec["threads"],
            micro_batch_tokens=spec["micro_batch_tokens"],
            activation_checkpointing="full" if spec.get("checkpointing") else "none",
        ),
    )


def main() -> None:
    """Obeys until stdin ends."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    pairs = [
        PreferencePair(
            id=f"1/{number}",
            prompt=Prompt(id=str(number), text="", token_ids=tuple(pair["prompt"])),
            chosen=completion(pair["chosen"]),
            rejected=completion(pair["rejected"]),
            chosen_score=1.0,
            rejected_score=0.0,
            iteration=1,
            reference=VERSION,
            scorer="random",
        )
        for number, pair in enumerate(spec["pairs"])
    ]
    trainer = make_trainer(spec)
    optimizer: Any = trainer._optimizer
    wanted: list[str] = []

    def write_gradients(*_: object) -> None:
        if wanted:
            parameters = trainer.policy.parameters_by_name().items()
            save_file({name: one.grad.contiguous() for name, one in parameters if one.grad is not None}, wanted.pop())

    optimizer.register_step_pre_hook(write_gradients)
    iterations = count(1)

    def step() -> None:
        trainer.begin_iteration(next(iterations), 1)  # the reference scores each batch anew, as TRL's does
        trainer.update(trainer.annotate(pack(pairs)))

    def memory() -> float:
        held = settle()
        step()
        return resident("VmHWM") - held

    products: list[Callable[[], float]] = []
    for line in sys.stdin:
        command, *files = line.split()
        wanted += files
        if command == "memory":
            answer = memory()
        elif command == "products":
            products = products or [products_of(step)]
            answer = products[0]()
        else:
            answer = seconds(step)
        print("answer", answer, flush=True)


if __name__ == "__main__":
    main()
