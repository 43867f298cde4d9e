"""`agon generate`: one prompt, one answer, from any model folder."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from learners.policy import load_model


def generate(model: str, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> str:
    """The model's answer to `prompt`, put into its chat template when it has one.

    Args:
        model: Hugging Face folder, such as `agon export` writes.
        prompt: what is asked.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        seed: of the sampling.

    Raises:
        ModelError: the folder holds no model.
    """
    disable_progress_bar()
    policy = load_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    output = policy.generate(**encoded, max_new_tokens=max_tokens, **sampling)  # type: ignore[operator]
    text: str = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
