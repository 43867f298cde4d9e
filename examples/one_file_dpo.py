"""Online iterative DPO in one file: no Ray, no vLLM, nothing hidden. Read it from top to bottom.

A tiny language model adds 4-digit numbers, one column a line, and is right about a third of the time. Nobody shows it
another solution. In each iteration it

    1. answers fresh problems several times          sample
    2. has each answer judged right or wrong         score
    3. pairs a right answer with a wrong one         make_pairs
    4. learns to prefer the right one of each pair   update

and starts over with what it has become. `agon run` does the same with many processes, vLLM, resume and every other
method; this file is the yardstick that it is tested against.

    python examples/one_file_dpo.py --seed 0
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conf.schema import ModelConfig, TinyConfig
from launch.initial_model import ensure_tiny_model
from orchestrator.tasks.addition import AdditionTask
from orchestrator.tasks.base import Problem


@dataclass(frozen=True)
class Settings:
    """What is worth turning. A large `beta` is what lets `lr` be large: each pair may move the policy only a little."""

    seed: int = 0
    iterations: int = 16
    prompts: int = 96  # fresh problems of one iteration
    samples: int = 8  # answers to each
    max_pairs: int = 2  # pairs made of one problem's answers, at most
    beta: float = 4.0  # the pull towards the reference; most work uses 0.1, with many more pairs and a tiny `lr`
    sft_weight: float = 2.0  # of the term that keeps right answers likely; see `dpo_loss`
    lr: float = 3e-4
    batch_pairs: int = 32  # pairs of one optimizer step
    warmup_steps: int = 5  # at the start of each iteration, since its first gradients are of new data
    max_tokens: int = 48  # of an answer; a complete one has 43
    test_problems: int = 512
    threads: int = 2


@dataclass(frozen=True)
class Answer:
    """One completion: its tokens (the end-of-sequence token included, where the model emitted one) and its score."""

    tokens: list[int]
    score: float


@dataclass(frozen=True)
class Pair:
    """One prompt with an answer that is preferred to another."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


# 1. Sample ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(model: PreTrainedModel, prompts: Tensor, eos: int, max_tokens: int, temperature: float) -> list[list[int]]:
    """One completion of each of the equally long prompts [B, T], decoded side by side; temperature 0 is greedy.

    The cache keeps the keys and values of what was read, so that each turn of the loop reads one new token a row.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    tokens, cache = prompts, None
    for _ in range(max_tokens):
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[:, -1], output.past_key_values
        drawn = (
            logits.argmax(-1) if temperature == 0 else torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        )
        for row, token in zip(rows, drawn.tolist(), strict=True):
            if eos not in row[-1:]:
                row.append(token)
        if all(row[-1] == eos for row in rows):
            break
        # Rows that are done go on as eos, which is never read: they cost time, not correctness.
        tokens = torch.tensor([[row[-1]] for row in rows])
    return rows


# 2. Score -------------------------------------------------------------------------------------------------------------


def score(tokens: list[int], problem: Problem, tokenizer: PreTrainedTokenizerBase) -> float:
    """1 if the answer ended itself and what follows its last '#' is the sum, else 0."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return float(tokens[-1] == tokenizer.eos_token_id and text.rpartition("#")[2] == problem.answer)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
) -> list[list[Answer]]:
    """`samples` scored answers to each problem."""
    prompts = torch.tensor([tokenizer(problem.content).input_ids for problem in problems])
    eos = tokenizer.eos_token_id
    flat = sample(model, prompts.repeat_interleave(samples, dim=0), eos, max_tokens, temperature)
    groups = [flat[start : start + samples] for start in range(0, len(flat), samples)]
    return [
        [Answer(tokens, score(tokens, problem, tokenizer)) for tokens in group]
        for problem, group in zip(problems, groups, strict=True)
    ]


# 3. Pair --------------------------------------------------------------------------------------------------------------


def make_pairs(prompt: list[int], answers: list[Answer], max_pairs: int) -> list[Pair]:
    """Best against worst, second best against second worst, and so on. A tie teaches nothing and makes no pair."""
    ranked = sorted(answers, key=lambda answer: -answer.score)
    inwards = zip(ranked, reversed(ranked), strict=True)
    unequal = [(best, worst) for best, worst in inwards if best.score > worst.score]
    return [Pair(prompt, best.tokens, worst.tokens) for best, worst in unequal[:max_pairs]]


# 4. Learn -------------------------------------------------------------------------------------------------------------


def completion_logprobs(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """The log-probability of each token of each completion, given the prompt and the tokens before it.

    Logits at position t predict token t + 1: the first token of a completion is predicted by the prompt's last one.
    """
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, which no earlier token can see
    logprobs = model(tokens[:, :-1]).logits.float().log_softmax(-1)
    taken = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return [
        row[len(prompt) - 1 : len(prompt) + len(completion) - 1]
        for row, prompt, completion in zip(taken, prompts, completions, strict=True)
    ]


def dpo_loss(
    chosen: list[Tensor], rejected: list[Tensor], ref_chosen: list[Tensor], ref_rejected: list[Tensor], s: Settings
) -> Tensor:
    """Mean over pairs of -log sigmoid(beta * Delta) + sft_weight * (-mean log-probability of a chosen token).

    Delta is how much more the policy prefers chosen to rejected than the reference does (Rafailov et al. 2023, eq. 7).
    It can grow while both answers become less likely, as long as the rejected one falls faster; the second term
    (Pang et al. 2024, iterative RPO) keeps the chosen answer from falling.
    """
    total = torch.zeros(())
    for right, wrong, ref_right, ref_wrong in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        delta = (right.sum() - ref_right.sum()) - (wrong.sum() - ref_wrong.sum())
        total = total - F.logsigmoid(s.beta * delta) - s.sft_weight * right.mean()
    return total / len(chosen)


def update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, pairs: list[Pair], s: Settings) -> float:
    """One pass over the pairs in small steps; returns the mean loss. The reference is the model as it is now."""
    reference = copy.deepcopy(model)
    losses = []
    for step, start in enumerate(range(0, len(pairs), s.batch_pairs)):
        batch = pairs[start : start + s.batch_pairs]
        prompts = [pair.prompt for pair in batch] * 2
        completions = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
        logprobs = completion_logprobs(model, prompts, completions)
        with torch.inference_mode():
            anchors = completion_logprobs(reference, prompts, completions)
        half = len(batch)
        loss = dpo_loss(logprobs[:half], logprobs[half:], anchors[:half], anchors[half:], s)

        optimizer.param_groups[0]["lr"] = s.lr * min(1.0, (step + 1) / (s.warmup_steps + 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # its running averages live on from iteration to iteration
        losses.append(loss.item())
    return sum(losses) / max(1, len(losses))


# The loop -------------------------------------------------------------------------------------------------------------


def accuracy(groups: list[list[Answer]]) -> float:
    """Share of answers that are right."""
    scores = [answer.score for group in groups for answer in group]
    return sum(scores) / len(scores)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], s: Settings) -> str:
    """Accuracy on problems that are never trained on, answered once greedily and once by sampling."""
    greedy = accuracy(answer(model, tokenizer, problems, samples=1, temperature=0, max_tokens=s.max_tokens))
    sampled = accuracy(answer(model, tokenizer, problems, samples=1, temperature=1, max_tokens=s.max_tokens))
    return f"test: greedy {greedy:.3f}, sampled {sampled:.3f}"


def main(s: Settings) -> None:
    """Trains and prints one line an iteration."""
    torch.set_num_threads(s.threads)
    random.seed(s.seed)
    torch.manual_seed(s.seed)
    task = AdditionTask(seed=s.seed)
    folder = ensure_tiny_model(ModelConfig(tiny=TinyConfig(seed=s.seed)), task)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0)
    problems, test = task.train(cursor=0), task.test(s.test_problems)

    start = time.monotonic()
    print(f"iteration  0  {evaluate(model, tokenizer, test, s)}")
    for iteration in range(1, s.iterations + 1):
        fresh = list(islice(problems, s.prompts))
        groups = answer(model, tokenizer, fresh, samples=s.samples, temperature=1, max_tokens=s.max_tokens)
        pairs = []
        for problem, answers in zip(fresh, groups, strict=True):
            pairs += make_pairs(tokenizer(problem.content).input_ids, answers, s.max_pairs)
        random.shuffle(pairs)
        loss = update(model, optimizer, pairs, s)
        print(
            f"iteration {iteration:2d}  {evaluate(model, tokenizer, test, s)}  train: accuracy {accuracy(groups):.3f}, "
            f"{len(pairs)} pairs, loss {loss:.3f}, {time.monotonic() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("seed", "iterations", "prompts", "samples", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name), help="default: %(default)s")
    main(Settings(**vars(parser.parse_args())))
