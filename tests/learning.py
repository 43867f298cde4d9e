"""Tiny models and random pairs for the tests of the learner."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from orchestrator.types import Completion, FinishReason, PolicyVersion, PreferencePair, Prompt

VOCAB = 61
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough that attention and head matter in the result, small enough that fp32 rounding stays below 1e-5 in
    # every gradient: at 0.3 a sharp softmax can amplify it to 1.1e-5.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

CONFIGS = {
    "llama": LlamaConfig(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "mistral": MistralConfig(**_COMMON, sliding_window=5),
}


def make_model(name_or_config, seed=0):
    """A model with random weights, dropout off."""
    config = CONFIGS[name_or_config] if isinstance(name_or_config, str) else name_or_config
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def make_pairs(num_prompts, *, pairs_per_prompt=2, seed=0, version=0, iteration=1):
    """Random pairs; those of one prompt share their chosen completion. Lengths 1 to 9."""
    random = np.random.default_rng(seed)
    policy = PolicyVersion(number=version, digest=f"{version:016x}")

    def tokens():
        return tuple(random.integers(0, VOCAB, random.integers(1, 10)).tolist())

    def completion():
        ids = tokens()
        return Completion(
            token_ids=ids, text="", logprobs=(-1.0,) * len(ids), finish_reason=FinishReason.EOS, policy=policy
        )

    pairs = []
    for number in range(num_prompts):
        prompt = Prompt(id=f"test/{number}", text="", token_ids=(number, *tokens()))
        chosen = completion()
        pairs += [
            PreferencePair(
                id=f"{iteration}/{prompt.id}/0>{index + 1}",
                prompt=prompt,
                chosen=chosen,
                rejected=completion(),
                chosen_score=1.0,
                rejected_score=0.0,
                iteration=iteration,
                reference=policy,
                scorer="test@1",
                weight=float(random.choice([0.5, 1.0])),
            )
            for index in range(pairs_per_prompt)
        ]
    return pairs
