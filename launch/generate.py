"""`agon generate`: one prompt, one answer, from any model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from conf.schema import TaskConfig
from learners.loading import tokenizer_of
from learners.policy import load_model
from orchestrator.prompts import Renderer
from orchestrator.tasks.base import Problem

if TYPE_CHECKING:
    from orchestrator.prompts import PromptTokenizer


def generate(model: str, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> str:
    """The model's answer to `prompt`, which is fed as a run feeds it: in the chat template where there is one.

    Args:
        model: Hugging Face folder, such as `agon export` writes.
        prompt: what is asked.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        seed: of the sampling.

    Raises:
        ModelError: the folder holds no model.
        DataError: the tokenizer refuses the prompt.
    """
    policy = load_model(model)
    tokenizer = tokenizer_of(model)
    tokens = torch.tensor([prompt_tokens(tokenizer, prompt)])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    output = policy.generate(  # type: ignore[operator]
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, **sampling
    )
    text: str = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    return text.strip()


def prompt_tokens(tokenizer: PromptTokenizer, prompt: str) -> tuple[int, ...]:
    """What a model is fed for `prompt`: the token ids that a run with the default `task.template` feeds it."""
    return Renderer(tokenizer, TaskConfig())(Problem(id="prompt", content=prompt, source="PROMPT")).token_ids
