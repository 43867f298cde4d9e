"""TRL's `DPOTrainer` on given pairs, one optimizer step a command; runs in TRL's own environment.

    python benchmarks/trl/dpo.py SPEC.json

Commands on stdin, an answer each: `step` takes a step and tells seconds; `memory` takes one and tells the peak, MiB,
above what was held before it; `gradients FILE` takes one and writes its gradients. Imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resident import resident, settle


class Obeys(TrainerCallback):
    """Waits for a command before each step, and answers after it."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Waits."""
        self.command = sys.stdin.readline().split()
        if not self.command:
            sys.exit(0)
        self.held = settle() if self.command[0] == "memory" else 0.0
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """Writes gradients before they are used."""
        if self.command[0] == "gradients":
            found = {name: one.grad.contiguous() for name, one in model.named_parameters() if one.grad is not None}
            save_file(found, self.command[1])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Answers."""
        seconds = time.perf_counter() - self.start
        print("answer", resident("VmHWM") - self.held if self.command[0] == "memory" else seconds, flush=True)


def words_of(ids: list[int]) -> str:
    """As the tokenizer has them; each word ends with a space, so that texts can be put together."""
    return "".join(f"t{number} " for number in ids)


def main() -> None:
    """Obeys until stdin ends."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    if products := os.environ.get("FP32_PRODUCTS"):
        torch.backends.mkldnn.matmul.fp32_precision = products
    rows = [{side: words_of(pair[side]) for side in ("prompt", "chosen", "rejected")} for pair in spec["pairs"]]
    config = DPOConfig(
        output_dir=spec["folder"],
        per_device_train_batch_size=spec["trl_batch"],
        gradient_accumulation_steps=len(rows) // spec["trl_batch"],
        max_steps=1_000_000,
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        beta=spec["beta"],
        max_grad_norm=spec["max_grad_norm"],
        max_length=None,
        bf16=False,
        gradient_checkpointing=spec.get("checkpointing", False),  # its default computes the forward pass twice
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[Obeys()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
