"""A language model that a judge can ask, scripted: any function of the question answers."""

import re

import numpy as np

from orchestrator.types import Completion, FinishReason, Prompt, RolloutGroup
from tests.records import V1

_BLOCK = re.compile(r"\[begin (?P<mark>\w+)\]\n(?P<text>.*?)\n\[end (?P=mark)\]", re.DOTALL)


class ScriptedModel:
    """One token a character.

    Args:
        reply: (blocks of the question, seed) -> the reply to it; the first block is what the assistant was asked.
        favour: (blocks of the question, verdict) -> log-prob of the verdict.
    """

    version = "v1-test"
    special_tokens = ("<pad>", "</s>", "<|im_start|>", "<|im_end|>")

    def __init__(self, reply=None, favour=None, max_length=100_000):
        self.reply, self.favour, self.max_length = reply, favour, max_length
        self.requests, self.sequences, self.finish = [], [], FinishReason.EOS

    def encode(self, text):
        return (1, *map(ord, text))

    def encode_chat(self, messages):
        return self.encode("".join(message.content for message in messages))

    def generate(self, requests):
        self.requests += requests
        replies = [self.reply(blocks(text_of(r.prompt_token_ids)), r.seed) for r in requests]
        return [
            Completion(token_ids=(2,), text=reply, logprobs=(0.0,), finish_reason=self.finish, policy=V1)
            for reply in replies
        ]

    def logprobs(self, sequences):
        self.sequences += sequences
        return [
            np.array([self.favour(blocks(text_of(prompt)), text_of((1, *ending)))], dtype=np.float32)
            for prompt, ending in sequences
        ]


def text_of(tokens):
    return "".join(map(chr, tokens[1:]))


def blocks(question):
    """The texts between the fences of a question, the lines that explain the fences aside."""
    return [found["text"] for found in _BLOCK.finditer(question)]


def group_of(*texts, prompt="What is 1+1?", finish=FinishReason.EOS, iteration=1):
    """A group with these completions; the tokens of one are its characters."""
    completions = tuple(
        Completion(
            token_ids=tuple(map(ord, text)), text=text, logprobs=(0.0,) * len(text), finish_reason=finish, policy=V1
        )
        for text in texts
    )
    asked = Prompt(id=f"task/{prompt}", text=prompt, token_ids=(1, 5), answer=None)
    return RolloutGroup(prompt=asked, completions=completions, iteration=iteration, seed=7)
