"""The stand-in engine where vLLM cannot be installed: plain transformers with a KV cache.

Requests are decoded in waves: those that wait are admitted once the running batch has drained. Rows that finish leave
the batch at once.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from actors.engine import EngineOutput, check_sequences, token_budget
from actors.held_weights import Held, outdated_among, take, unreadable_among
from actors.roomy_cache import roomy_cache
from learners.loading import load, tokenizer_of
from orchestrator.errors import ConfigError, ModelError
from orchestrator.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from orchestrator.types import GenerationRequest
    from orchestrator.weights import TensorRecord

SCORED_TOKENS = 2048
"""Tokens of one scoring forward: its logits are held at once."""


@dataclass(kw_only=True, slots=True)
class _Row:
    """A request that runs or waits."""

    request: GenerationRequest
    uniform: torch.Tensor
    """[the most tokens it may get], which are drawn by it."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """`actors.engine.Engine` on transformers."""

    def __init__(
        self,
        *,
        model_dir: str,
        dtype: str,
        max_length: int,
        max_num_seqs: int,
        kv_cache_mb: int,
        gpu_memory_utilization: float,
        tensor_parallel_size: int,
        seed: int,
        weight_transport: str = "object_store",
    ) -> None:
        """Loads the model; arguments as of `VllmEngine`.

        `kv_cache_mb`, `gpu_memory_utilization` and `seed` change nothing: the cache grows with the batch, and every
        request has a seed.

        Raises:
            ConfigError: More than one GPU for one copy of the weights, or weights sent from GPU to GPU.
            ModelError: The model's positions end before `max_length`.
        """
        if tensor_parallel_size != 1:
            raise ConfigError(
                f"generator.tensor_parallel_size is {tensor_parallel_size}; generator.kind=transformers runs on one "
                "device. Set it to 1 or use generator.kind=vllm."
            )
        if weight_transport != "object_store":
            raise ConfigError(
                f"cluster.weight_transport is {weight_transport!r}; generator.kind=transformers takes weights from the "
                "object store only. Set it to object_store or use generator.kind=vllm."
            )
        logging.disable_progress_bar()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load(AutoModelForCausalLM, model_dir, getattr(torch, dtype))
        positions = model.config.max_position_embeddings
        if positions < max_length:
            raise ModelError(f"{model_dir} has {positions} positions; model.max_length is {max_length}. Lower it.")
        self._model = model.to(self._device)
        self._held: dict[str, torch.Tensor] = self._model.state_dict(keep_vars=True)
        self._tokenizer = tokenizer_of(model_dir)
        ends = self._model.generation_config.eos_token_id
        self._ends = {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self._max_length = max_length
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.empty(0, 0, dtype=torch.long, device=self._device)
        self._draws: _Draws

    def add(self, request: GenerationRequest) -> None:
        """Queues a request. Raises ValueError for one that can never be served."""
        if any(row.request.id == request.id for row in (*self._rows, *self._waiting)):
            raise ValueError(f"Request {request.id!r} is in flight already; give every request an id of its own.")
        budget = token_budget(request, max_length=self._max_length, vocab_size=self._model.config.vocab_size)
        uniform = torch.rand(budget, generator=torch.Generator().manual_seed(request.seed))
        self._waiting.append(_Row(request=request, uniform=uniform))

    @torch.inference_mode()
    def step(self) -> list[EngineOutput]:
        """Advances every running request by one token; returns those that finished."""
        if not self._rows:
            if not self._waiting:
                return []
            self._rows = [self._waiting.popleft() for _ in range(min(self._max_num_seqs, len(self._waiting)))]
            self._cache, self._draws = None, _Draws.of(self._rows, self._device)
        logits = self._prefill() if self._cache is None else self._decode()
        logprobs = logits.log_softmax(-1)
        tokens = self._draws.sample(logits, len(self._rows[0].token_ids))
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        outputs = []
        for row, token, logprob in zip(self._rows, tokens.tolist(), chosen.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            outputs.append(self._output(row))
        self._keep([index for index, output in enumerate(outputs) if output is None])
        return [output for output in outputs if output is not None]

    @torch.inference_mode()
    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops requests; unknown ids are ignored."""
        dropped = set(request_ids)
        self._waiting = deque(row for row in self._waiting if row.request.id not in dropped)
        self._keep([index for index, row in enumerate(self._rows) if row.request.id not in dropped])

    def lengths(self) -> Mapping[str, int]:
        """New tokens so far of each request that `step` goes on with."""
        return {row.request.id: len(row.token_ids) for row in (*self._rows, *self._waiting)}

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._rows or self._waiting)

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, torch.Tensor], *, lasts: bool = False) -> None:
        """Replaces weights in place; keys and values of running requests are computed again. `lasts`: see `Engine`.

        Raises:
            ModelError: The model has no tensor of that name and shape.
        """
        held = self._held
        for name, tensor in tensors.items():
            if name not in held or held[name].shape != tensor.shape:
                shape = tuple(held[name].shape) if name in held else "no such tensor"
                raise ModelError(f"Weights to load name {name!r} of {tuple(tensor.shape)}; the model has {shape}.")
        if self._device.type == "cpu":
            take(self._model, tensors, self._find, lasts=lasts)
        else:
            for name, tensor in tensors.items():
                held[name].data.copy_(tensor)
        self._cache = None

    def outdated(self, records: Sequence[TensorRecord]) -> list[str]:
        """Names of tensors that have another checksum than their record; see `unreadable`."""
        return outdated_among(records, self._find)

    def unreadable(self, records: Sequence[TensorRecord]) -> list[str]:
        """Those that `outdated` cannot compare: unknown to the model, or of another dtype."""
        return unreadable_among(records, self._find)

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs of ``sequence[1:]`` given their prefixes, each [len(sequence) - 1]. No cache is used."""
        check_sequences(sequences, max_length=self._max_length, vocab_size=self._model.config.vocab_size)
        scores: list[NDArray[np.float32]] = []
        rows = max(1, SCORED_TOKENS // max(map(len, sequences), default=1))
        for start in range(0, len(sequences), rows):
            part = [torch.tensor(sequence) for sequence in sequences[start : start + rows]]
            # Padded on the right, where causal attention never looks and positions need no shift.
            tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(self._device)
            mask = torch.ones_like(tokens)
            logits = self._model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0].cpu().numpy()
            scores += [row[: len(sequence) - 1].copy() for row, sequence in zip(chosen, part, strict=True)]
        return scores

    def close(self) -> None:
        """Frees the device."""
        del self._model, self._held, self._cache
        torch.cuda.empty_cache()

    def _find(self, name: str) -> Held | None:
        """A tensor of the checkpoint, which transformers holds by the same name."""
        held = self._held.get(name)
        return None if held is None else Held(held, held.detach())

    def _prefill(self) -> torch.Tensor:
        """Runs prompts and the tokens they have so far, padded on the left. Returns logits [B, V] of the last.

        Rows that are alike, as all completions of a prompt begin, are run as one.
        """
        sequences = [(*row.request.prompt_token_ids, *row.token_ids) for row in self._rows]
        places = {sequence: place for place, sequence in enumerate(dict.fromkeys(sequences))}
        width = max(map(len, sequences))
        tokens = torch.tensor([[0] * (width - len(sequence)) + [*sequence] for sequence in places], device=self._device)
        lengths = torch.tensor([len(sequence) for sequence in places], device=self._device)
        self._mask = (torch.arange(width, device=self._device) >= width - lengths[:, None]).long()
        self._cache = roomy_cache(self._model.config)
        logits = self._forward(tokens, (self._mask.cumsum(1) - 1).clamp(min=0))
        spread = torch.tensor([places[sequence] for sequence in sequences], device=self._device)
        self._cache.batch_select_indices(spread)
        self._mask = self._mask[spread]
        return logits[spread]

    def _decode(self) -> torch.Tensor:
        """Runs the newest token of each row. Returns its logits [B, V]."""
        tokens = torch.tensor([[row.token_ids[-1]] for row in self._rows], device=self._device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], dim=1)
        return self._forward(tokens, self._mask.sum(1, keepdim=True) - 1)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output: Any = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _keep(self, rows: list[int]) -> None:
        """Drops all other rows from the batch; the last ones take their places, so that few keys and values move."""
        if len(rows) == len(self._rows):
            return
        stay, move = {row for row in rows if row < len(rows)}, iter([row for row in rows if row >= len(rows)])
        order = [place if place in stay else next(move) for place in range(len(rows))]
        self._rows = [self._rows[row] for row in order]
        if not self._rows:
            return
        kept = torch.tensor(order, device=self._device)
        self._draws = self._draws.kept(kept)
        if self._cache is not None:
            self._cache.batch_select_indices(kept)
            self._mask = self._mask[kept]

    def _output(self, row: _Row) -> EngineOutput | None:
        """The finished request, or None while it goes on."""
        text: str | None = None
        reason: FinishReason | None = None
        if row.token_ids[-1] in self._ends:
            reason = FinishReason.EOS
        elif row.request.sampling.stop:
            text = self._text(row)
            ends = [text.find(stop) + len(stop) for stop in row.request.sampling.stop if stop in text]
            if ends:
                reason, text = FinishReason.STOP, text[: min(ends)]
        if reason is None and len(row.token_ids) == len(row.uniform):
            reason = FinishReason.LENGTH
        if reason is None:
            return None
        return EngineOutput(
            request_id=row.request.id,
            token_ids=tuple(row.token_ids),
            text=self._text(row) if text is None else text,
            logprobs=tuple(row.logprobs),
            finish_reason=reason,
        )

    def _text(self, row: _Row) -> str:
        text: str = self._tokenizer.decode(row.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draws:
    """How the rows of a batch are drawn."""

    temperature: torch.Tensor
    """[B]"""
    top_p: torch.Tensor
    """[B]"""
    uniform: torch.Tensor
    """[B, T]: of each token, from 0 to 1."""

    @classmethod
    def of(cls, rows: Sequence[_Row], device: torch.device) -> _Draws:
        """Those of rows."""
        samplings = [(row.request.sampling.temperature, row.request.sampling.top_p) for row in rows]
        temperature, top_p = torch.tensor(samplings, device=device).T
        uniform = torch.nn.utils.rnn.pad_sequence([row.uniform for row in rows], batch_first=True)
        return cls(temperature=temperature, top_p=top_p, uniform=uniform.to(device))

    def kept(self, rows: torch.Tensor) -> _Draws:
        """Those of some rows, by index."""
        return _Draws(temperature=self.temperature[rows], top_p=self.top_p[rows], uniform=self.uniform[rows])

    def sample(self, logits: torch.Tensor, number: int) -> torch.Tensor:
        """Draws token `number` [B] of each row from logits [B, V], by inverting the cumulative distribution.

        It runs over the vocabulary in its own order, not in that of probability: rounding that differs with the batch
        then moves a boundary by a rounding error and no token changes places.
        """
        temperature, top_p = self.temperature, self.top_p
        probs = (logits / temperature.where(temperature > 0, 1.0)[:, None]).softmax(-1)
        if (top_p < 1).any():
            ranked = probs.sort(dim=-1, descending=True).values
            inside = ranked.cumsum(-1) - ranked < top_p[:, None]
            least = ranked.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
            probs = probs.where((probs >= least) | (top_p >= 1)[:, None], 0.0)
        cumulative = probs.double().cumsum(-1)
        uniform = self.uniform[:, number, None].double()
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        return logits.argmax(-1).where(temperature == 0, drawn.clamp(max=logits.shape[-1] - 1))
