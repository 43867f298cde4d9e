"""TRL's `OnlineDPOTrainer`; runs in TRL's own environment.

    python benchmarks/trl/online.py SPEC.json

Where the specification has `save_every`, trains to the end and writes the weights every so many steps, in a folder
named after the seconds since the time that it gives; else takes a step a command, as `dpo.py` does. Imports nothing of
this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from dpo import Obeys
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


class Saves(TrainerCallback):
    """Writes the policy as it is after each `every` steps."""

    def __init__(self, every: int, out: Path, start: float) -> None:
        self.every, self.out, self.start = every, out, start

    def on_step_end(self, _: Any, state: Any, __: Any, *, model: Any, processing_class: Any, **kwargs: Any) -> None:
        """Writes it, with its tokenizer."""
        if state.global_step % self.every == 0:
            folder = self.out / f"{time.time() - self.start:.2f}"
            model.save_pretrained(folder)
            processing_class.save_pretrained(folder)


def main() -> None:
    """Trains to the end of its steps."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    if products := os.environ.get("FP32_PRODUCTS"):
        torch.backends.mkldnn.matmul.fp32_precision = products
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    eos, adam_betas = tokenizer.eos_token_id, spec.get("adam_betas", (0.9, 0.999))

    def checksum(completions: list[str], **_: Any) -> list[float]:
        return [zlib.crc32(text.encode()) / 2**32 for text in completions]

    def solved(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        ended = [eos in ids for ids in completion_ids]
        given = [text.rpartition("#")[2] for text in completions]
        return [float(end and one == right) for end, one, right in zip(ended, given, answer, strict=True)]

    config = OnlineDPOConfig(
        output_dir=spec["out"],
        per_device_train_batch_size=spec["prompts"],
        max_steps=spec["steps"],
        learning_rate=spec["lr"],
        beta=spec["beta"],
        adam_beta1=adam_betas[0],
        adam_beta2=adam_betas[1],
        lr_scheduler_type="constant",
        max_new_tokens=spec["max_tokens"],
        max_length=spec["max_length"],
        temperature=1.0,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=spec["seed"],
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        reward_funcs=checksum if spec.get("reward") == "checksum" else solved,
        args=config,
        train_dataset=Dataset.from_list(spec["problems"]),
        processing_class=tokenizer,
        callbacks=[Saves(spec["save_every"], Path(spec["out"]), spec["start"]) if "save_every" in spec else Obeys()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
