r"""Teaches the warm-started tiny model to judge steps, as evaluation fine-tuning data teaches a large one.

    seed data      J5305+2471\n  ->  5+1+0=06:06Y\n0+7+0=08:07N\n...   flawed solutions; behind each line what should
                                      stand there, and the verdict
    replayed       5305+2471\n   ->  what the model itself answers, so that the policy stays where it was

The verdicts say what the lines' authors knew; no sample of the policy is ever graded (Yuan et al. 2024,
"Self-Rewarding Language Models", section 2.1: seed data for instruction following and for evaluation).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from launch import tiny
from launch.seeds import TINY_SEEDS
from launch.tiny import VOCABULARY
from launch.warm_start import IGNORED, WARMUP_STEPS, sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from conf.schema import TinyConfig
    from launch.initial_model import Progress
    from orchestrator.tasks.addition import AdditionTask

HEAD, YES, NO = "J", "Y", "N"
NUM_SEEDS, NUM_REPLAYED = 4096, 1024
LR = 1e-3


def write_seeds(task: AdditionTask, seed: int, folder: Path) -> Path:
    """Writes the seed data beside the model; the learner replays it while the policy judges itself."""
    path = folder / TINY_SEEDS
    with path.open("w", encoding="utf-8") as file:
        for problem, steps in task.judged_solutions(NUM_SEEDS, seed):
            text, spans = "", []
            for step in steps:
                verdict = f"{step.result}{YES if step.right else NO}"
                text += f"{step.line}:"
                spans.append([len(text), len(text) + len(verdict)])
                text += f"{verdict}\n"
            text = text.removesuffix("\n")
            file.write(json.dumps({"prompt": f"{HEAD}{problem.content}", "completion": text, "spans": spans}) + "\n")
    return path


def teach_judging(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: AdditionTask,
    config: TinyConfig,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Trains `model` in place for `config.judge_steps` on seed data and, in equal parts, on its own answers.

    Args:
        model: after `warm_start`.
        tokenizer: its tokenizer.
        task: gives the flawed solutions.
        config: steps, batch size and seed.
        folder: where the seed data is left for the learner to replay.
        progress: called after each step.
    """
    judged = _batches(*_judged_rows(tokenizer, write_seeds(task, config.seed, folder)), config)
    replayed = _batches(*_own_answers(model, tokenizer, task, config), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step in range(1, config.judge_steps + 1):
        rate = min(1.0, step / WARMUP_STEPS, 2 * (1 - step / config.judge_steps) + 0.05)
        optimizer.param_groups[0]["lr"] = LR * rate
        losses = [_nll(model, *next(batches)) for batches in (judged, replayed)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step, config.judge_steps, float(losses[0].detach()), 0.0)


def _judged_rows(tokenizer: PreTrainedTokenizerFast, seeds: Path) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of the seed data, both [n, T]; one token a character, and all rows have the same length."""
    rows, labels = [], []
    for line in seeds.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tokens = tokenizer(row["prompt"] + row["completion"]).input_ids
        start = len(tokens) - len(row["completion"])
        learned = {start + at for first, last in row["spans"] for at in range(first, last)}
        rows.append(tokens)
        labels.append([tokens[at + 1] if at + 1 in learned else IGNORED for at in range(len(tokens))])
    return torch.tensor(rows), torch.tensor(labels)


def _own_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: AdditionTask, config: TinyConfig
) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of what the model answers at temperature 1, both [n, T]."""
    problems = [problem for problem, _ in task.demonstrations(NUM_REPLAYED, config.seed)]
    prompts = torch.tensor([tokenizer(problem.content).input_ids for problem in problems])
    longest = 10 * task.digits + 3
    generator = torch.Generator().manual_seed(config.seed)
    answers = sample(model, prompts, max_tokens=longest, temperature=1.0, generator=generator)
    tokens = torch.cat([prompts, answers], 1)
    labels = torch.full_like(tokens, IGNORED)
    labels[:, prompts.shape[1] - 1 : -1] = answers
    return tokens, labels.masked_fill(labels == VOCABULARY[tiny.PAD], IGNORED)


def _batches(tokens: Tensor, labels: Tensor, config: TinyConfig) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        for chosen in torch.split(torch.randperm(len(tokens), generator=generator), config.batch_size):
            yield tokens[chosen], labels[chosen]


def _nll(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
