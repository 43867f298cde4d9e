"""The cache with room holds what transformers' own holds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig

from actors.roomy_cache import _ROOM, roomy_cache

CONFIG = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
STEPS = st.one_of(st.integers(1, _ROOM + 1), st.lists(st.integers(0, 3), min_size=1, max_size=6))
"""Tokens that are added, or which of the rows stay, in which order and how often."""


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=12))
def test_it_holds_what_transformers_own_holds(steps):
    caches, rows = (roomy_cache(CONFIG), DynamicCache(config=CONFIG)), 4
    for step in steps:
        if isinstance(step, int):
            for layer in range(2):
                new = torch.randn(2, rows, 2, step, 4)
                ours, theirs = (cache.update(*new, layer) for cache in caches)
                assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        elif kept := [row for row in step if row < rows]:
            rows = len(kept)
            for cache in caches:
                cache.batch_select_indices(torch.tensor(kept))
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
