"""The policy as the learner holds it: a Hugging Face model with fp32 master weights, and how it scores completions.

**Precision.** Weights, gradients, Adam's moments and the reference are fp32 whatever `dtype` says. With bfloat16 the
forward and backward passes run under autocast, so matrix products take bf16 inputs while norms, softmax and the
vocabulary's log-sum-exp stay fp32. At the learning rates of preference optimization (about 5e-7) an update is far
smaller than bf16's spacing (relative 4e-3): weights kept in bf16 would not move. Memory is the same 16 bytes a
parameter as bf16 weights beside an fp32 copy.

**Dropout** is off: a log-ratio between two networks thinned differently is noise.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

from learners.loading import load
from learners.logprobs import TokenScores, check_flex, check_packing, plain_token_logprobs, token_logprobs
from learners.packed import ATTENTION, Way
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from learners.packed import PackedColumns

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(folder: str | Path) -> nn.Module:
    """Load a causal language model from a folder in fp32; see `learners.loading`.

    Raises:
        ModelError: the folder has no config, no safetensors, not all weights, or an architecture that transformers does
            not know.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}; the learner needs a Hugging Face model folder")
    return load(AutoModelForCausalLM, folder, torch.float32)


_ATEN = torch.ops.aten
_KEPT = [
    *(_ATEN.mm.default, _ATEN.addmm.default),
    *(_ATEN._scaled_dot_product_flash_attention.default, _ATEN._scaled_dot_product_efficient_attention.default),
    *(_ATEN._scaled_dot_product_cudnn_attention.default, _ATEN._flash_attention_forward.default),
]
"""What takes long for the size of its result. Batched products are not among them: attention on CPUs is made of them,
and their results are its scores."""


class Policy(nn.Module):
    """A model and the way its log-probs are computed, packed where that is proved for this very model.

    Args:
        model: from `load_model`, on its device.
        dtype: "float32" or "bfloat16", of the matrix products.
        vocab_chunk: columns of the vocabulary whose logits exist at once.
        logits_mb: see `token_logprobs`.
        activation_checkpointing: "none", "full": layers are computed again in the backward pass, or "selective": all of
            a layer but its matrix products and attention kernels, whose results are kept.
        flex: share prompts in attention on a GPU, if that proves right for the model.
        seed: of the probe that proves packing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: str,
        vocab_chunk: int,
        logits_mb: int = 0,
        activation_checkpointing: str = "none",
        flex: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = DTYPES[dtype]
        self.vocab_chunk = vocab_chunk
        self.logits_mb = logits_mb
        self.device = next(model.parameters()).device
        anyhow: Any = model
        anyhow.set_attn_implementation(ATTENTION)
        if activation_checkpointing != "none":
            # Models checkpoint their layers in training mode only; dropout is 0 by `load_model`.
            how: dict[str, Any] = {"use_reentrant": False}
            if activation_checkpointing == "selective":
                how["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
            anyhow.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            model.train()
        self.packing_refused = check_packing(model, vocab_chunk=vocab_chunk, seed=seed)
        """Why completions are scored in padded rows; None when they are packed."""
        if self.packing_refused:
            log.warning("padded instead of packed log-probs (slower, more memory): %s", self.packing_refused)
        self.way: Way | None = None
        """Of attention where completions are packed; None: `run_base_model` chooses."""
        if flex and self.packing_refused is None and self.device.type != "cpu":
            refused = check_flex(model, vocab_chunk=vocab_chunk, dtype=self.dtype, seed=seed)
            if refused:
                log.warning("learner.flex_attention is left out: %s", refused)
            else:
                self.way = Way.FLEX

    def forward(self, columns: PackedColumns) -> Tensor:
        """Log-prob [C] (fp32) of each completion token; differentiable."""
        return self.scores(columns).logprobs

    def scores(self, columns: PackedColumns, *, collision: bool = False) -> TokenScores:
        """Log-probs with what comes beside them; see `TokenScores`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.packing_refused is None:
                return token_logprobs(
                    self.model,
                    columns,
                    vocab_chunk=self.vocab_chunk,
                    logits_mb=self.logits_mb,
                    collision=collision,
                    way=self.way,
                )
            return plain_token_logprobs(self.model, columns, collision=collision)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The model's parameters, tied ones once."""
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def logprobs_with(self, parameters: Mapping[str, Tensor] | None, columns: PackedColumns) -> Tensor:
        """Log-prob [C] under other parameters of the same architecture, or the live ones (None); no gradient."""
        if parameters is None:
            result: Tensor = self(columns)
        else:
            swapped = {f"model.{name}": tensor for name, tensor in parameters.items()}
            result = torch.func.functional_call(self, swapped, (columns,))
        return result
