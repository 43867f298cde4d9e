"""The warm start: teaches the tiny model the task's format, and stops while there is much left to learn.

Supervised training on worked solutions, until the share of tuning problems that a sampled answer solves lands in a
window. The share rises from .2 to .5 within some 25 steps and so jumps over the window now and then; the weights that
lie in it are then found by bisection, on the line between the weights before and after the jump.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from launch import tiny
from launch.tiny import VOCABULARY, make_model, make_tokenizer
from learners.products import use_fastest_products
from orchestrator.errors import ModelError
from orchestrator.tasks import addition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from conf.schema import ModelConfig, TinyConfig
    from launch.initial_model import Progress
    from orchestrator.tasks.addition import AdditionTask

WINDOW = 0.10  # accuracy may end this much above the target; with the error of measuring it, .28 lands below .42
GLANCE, LOOK = 128, 1024  # tuning problems of a first, cheap measurement and of the one that decides
NEAR = 0.05  # how far below the target a glance may be and still deserve a look
EVALUATE_EVERY = 5  # steps
LOSS_WORTH_A_GLANCE = 0.2  # nats a token of the solution; above it next to no sampled solution is right
WARMUP_STEPS = 50
NUM_THREADS = 2
BISECTIONS = 10
IGNORED = -100


def make_tiny_model(model: ModelConfig, task: AdditionTask, progress: Progress | None, folder: Path) -> None:
    """Writes the warm-started tiny model into a new folder, an ordinary one of Hugging Face.

    Args:
        model: `kind="tiny"`; its size, seed and target accuracy.
        task: Gives demonstrations and tuning problems; its training and test problems are never touched.
        progress: Called after each step.
        folder: Made here.

    Raises:
        ModelError: The target accuracy was not reached within `model.tiny.max_steps`.
    """
    use_fastest_products()
    tokenizer = make_tokenizer(model.max_length)
    folder.mkdir()
    with _threads(NUM_THREADS):
        network = warm_start(make_model(model), tokenizer, task, model.tiny, progress)
        if model.tiny.judge_steps:
            from launch import judge_start

            judge_start.teach_judging(network, tokenizer, task, model.tiny, folder, progress)
    save(network, tokenizer, folder)


def warm_start(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: AdditionTask,
    config: TinyConfig,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """Trains `model` in place until its sampled accuracy is in [target, target + WINDOW]. Raises ModelError if not."""
    batches = demonstration_batches(tokenizer, task, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    look = partial(measure_accuracy, model, tokenizer, task, seed=config.seed)
    low, high = config.target_accuracy, config.target_accuracy + WINDOW
    below, accuracy, loss = _weights(model), 0.0, float("inf")
    for step in range(1, config.max_steps + 1):
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / WARMUP_STEPS)
        loss = train_step(model, optimizer, *next(batches))
        if step % EVALUATE_EVERY == 0 and loss < LOSS_WORTH_A_GLANCE:
            accuracy = look(num_problems=GLANCE)
            if accuracy > low - NEAR:
                accuracy = look(num_problems=LOOK)
            if accuracy > high:
                accuracy = bisect(model, below, low, high, partial(look, num_problems=LOOK))
            below = _weights(model)
        if progress is not None:
            progress(step, config.max_steps, loss, accuracy)
        if low <= accuracy <= high:
            return model
    raise ModelError(
        f"The tiny model did not land in a sampled accuracy of {low:.2f} to {high:.2f} within "
        f"model.tiny.max_steps={config.max_steps} steps: {accuracy:.2f} at the end, with a loss of {loss:.2f}. "
        "Raise model.tiny.max_steps, lower model.tiny.target_accuracy or change model.tiny.lr."
    )


def bisect(
    model: LlamaForCausalLM, below: dict[str, Tensor], low: float, high: float, look: Callable[[], float]
) -> float:
    """Moves `model`, whose accuracy is above `high`, towards the weights `below` until `look()` is in [low, high].

    Returns:
        The accuracy. It changes continuously along the line, so that it crosses the window somewhere.
    """
    above = _weights(model)
    left, right, accuracy = 0.0, 1.0, 1.0
    for _ in range(BISECTIONS):
        if low <= accuracy <= high:
            break
        middle = (left + right) / 2
        model.load_state_dict({name: torch.lerp(below[name], above[name], middle) for name in above})
        accuracy = look()
        left, right = (left, middle) if accuracy > high else (middle, right)
    return accuracy


def demonstration_batches(
    tokenizer: PreTrainedTokenizerFast, task: AdditionTask, config: TinyConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, labels), both [batch, T]; labels are shifted and ignore the question."""
    pairs = task.demonstrations(config.demonstrations, config.seed)
    rows = [[*tokenizer(f"{problem.content}{text}").input_ids, VOCABULARY[tiny.EOS]] for problem, text in pairs]
    question = len(tokenizer(pairs[0][0].content).input_ids)
    tokens = torch.tensor(rows)  # every problem of the task has the same length
    labels = torch.full_like(tokens, IGNORED)
    labels[:, question - 1 : -1] = tokens[:, question:]
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        for chosen in torch.split(order, config.batch_size):
            yield tokens[chosen], labels[chosen]


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor) -> float:
    """One step on the token-mean negative log-likelihood; returns it."""
    model.train()
    logits = model(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def measure_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: AdditionTask,
    *,
    num_problems: int,
    seed: int,
    temperature: float = 1.0,
) -> float:
    """Share of the first `num_problems` tuning problems that one sampled completion answers right and ends itself."""
    problems = task.tuning(num_problems)
    prompts = torch.tensor([tokenizer(problem.content).input_ids for problem in problems])
    longest = len(tokenizer(addition.worked_solution(0, 0, task.digits)).input_ids)  # its BOS makes room for the EOS
    generator = torch.Generator().manual_seed(seed)
    answers = sample(model, prompts, max_tokens=longest, temperature=temperature, generator=generator).tolist()
    ends = [f"#{problem.answer}{tiny.EOS}" for problem in problems]
    texts = [tokenizer.decode(answer) for answer in answers]
    solved = [text.split(tiny.PAD)[0].endswith(end) for text, end in zip(texts, ends, strict=True)]
    return float(sum(solved) / len(solved))


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM, prompts: Tensor, *, max_tokens: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Completions of equally long prompts [batch, T], decoded together; temperature 0 is greedy.

    Returns:
        [batch, at most max_tokens] token ids, padded after EOS.
    """
    model.eval()
    done = torch.zeros(len(prompts), dtype=torch.bool)
    columns: list[Tensor] = []
    tokens, cache = prompts, None
    while len(columns) < max_tokens and not done.all():
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[:, -1], output.past_key_values
        if temperature == 0:
            column = logits.argmax(-1)
        else:
            column = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(-1)
        column = column.masked_fill(done, VOCABULARY[tiny.PAD])
        done |= column == VOCABULARY[tiny.EOS]
        columns.append(column)
        tokens = column.unsqueeze(-1)
    return torch.stack(columns, dim=1)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights (safetensors), config, generation config and tokenizer."""
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limits torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
