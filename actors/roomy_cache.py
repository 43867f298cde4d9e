"""A KV cache of transformers that leaves room behind what it holds.

Transformers' own copies all keys and values of a batch for each token that is added: half of the time of a small model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Tokens."""


def roomy_cache(config: Any) -> DynamicCache:
    """An empty one for a model; layers with a sliding window are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Shapes: B rows, H heads, T tokens held, E width of a head."""

    _rooms: tuple[Tensor, Tensor] | None = None
    """What keys and values [B, H, T, E] are the beginning of: each [B, H, at least T, E]."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values of new tokens; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[2]
        if self._rooms is None or end > self._rooms[0].shape[2]:
            shapes = [(*states.shape[:2], end + _ROOM, states.shape[3]) for states in new]
            larger = new[0].new_empty(shapes[0]), new[1].new_empty(shapes[1])
            for room, held in zip(larger, (self.keys, self.values), strict=True):
                if start:
                    room[:, :, :start] = held
            self._rooms = larger
        for room, states in zip(self._rooms, new, strict=True):
            room[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order and as often; those that are where they should be are not touched."""
        if self._rooms is None:
            return
        length, places = self.get_seq_length(), torch.arange(len(indices), device=indices.device)
        if len(indices) > len(self._rooms[0]):
            self._rooms = self._rooms[0][indices], self._rooms[1][indices]
        else:
            moved = places[indices != places]
            for room in self._rooms:
                room[moved] = room[indices[moved]]
            self._rooms = self._rooms[0][: len(indices)], self._rooms[1][: len(indices)]
        self._show(length)

    def _show(self, length: int) -> None:
        assert self._rooms is not None
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)
