"""Texts to the tokens that a preference model reads, with its own tokenizer, which need not be the policy's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learners.preference.records import Tokens


class Encoder:
    """Encodes prompts and answers apart, so that what an answer says can never become part of the prompt.

    Args:
        tokenizer: Hugging Face tokenizer of the model, with an end-of-sequence token.
        max_length: context of the model, tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def prompt(self, text: str) -> Tokens:
        """A prompt as the policy read it, template included; begins with BOS where the model has one, once."""
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text's template has written it as well
            ids = ids[1:]
        if ids[-1:] == [eos] and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return tuple(ids)

    def answer(self, text: str, *, ended: bool = True) -> Tokens:
        """An answer, with an EOS behind it if it ended itself. An EOS that it spells out is text like any other."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return (*ids, self.tokenizer.eos_token_id) if ended else tuple(ids)
