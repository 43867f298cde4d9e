"""Models that compare answers: three heads on a Hugging Face backbone.

    preference_model   L(a, b) = r(a | x, b) - r(b | x, a)        each answer is read behind its rival, both ways round
    gpm                L(a, b) = v(a | x)^T R v(b | x) / tau       unit vectors; any preference, cyclic ones included
    reward_model       L(a, b) = r(a | x) - r(b | x)               Bradley-Terry: transitive by construction

and P(a beats b) = sigmoid(L(a, b)). All three are antisymmetric by construction, in training as in use, so that
P(a, b) + P(b, a) = 1 whatever the weights: the order in which two answers are shown cannot matter.

Shapes: B rows, T tokens of the longest row, D hidden width, W width of the readout, P comparisons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from learners.preference.config import HeadConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from learners.preference.records import Group, Tokens

    Row = tuple[Tokens, Tokens]
    """(what is read first, the answer that is judged)."""

BATCH_TOKENS = 1 << 15
"""Read at once, at least one row."""


class PreferenceModel(nn.Module):
    """A backbone and a readout of its last hidden state at the last token of an answer.

    Args:
        backbone: of `AutoModel`, or of `AutoModelForCausalLM` where `head.likelihood` is set.
        head: which of the three.
    """

    def __init__(self, backbone: nn.Module, head: HeadConfig) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head
        anyhow: Any = backbone
        self.readout = nn.Linear(anyhow.config.hidden_size, head.width)
        nn.init.normal_(self.readout.weight, std=0.01)
        nn.init.zeros_(self.readout.bias)
        if head.kind == "gpm":
            # Vectors of about one direction: comparisons begin near 1/2, where the sigmoid is steep.
            nn.init.ones_(self.readout.bias[1::2])
        if head.likelihood:
            # A sum of log-probs says something from the first step on: it begins as the (scaled) reward itself, or as
            # what turns a gpm's vectors. 0.2 a nat puts the differences of one prompt's answers where they count.
            self.likelihood = nn.Parameter(torch.zeros(head.width))
            self.likelihood.data[0::2] = 0.2

    def forward(self, groups: Sequence[Group]) -> Tensor:
        """L(first, second) of every comparison, group after group: [P], fp32."""
        if self.head.kind == "preference_model":
            return self._read_in_context(groups)
        values = self.read([(group.prompt, answer) for group in groups for answer in group.answers])
        first, second, offset = [], [], 0
        for group in groups:
            first += [offset + comparison.first for comparison in group.comparisons]
            second += [offset + comparison.second for comparison in group.comparisons]
            offset += len(group.answers)
        left, right = values[first], values[second]
        if self.head.kind == "gpm":
            return skew_score(unit(left), unit(right)) / self.head.temperature
        return (left - right).squeeze(-1)

    def rewards(self, rows: Sequence[Row]) -> Tensor:
        """r(answer | prompt) of a reward model, [B]: higher is better; only differences within a prompt mean much."""
        if self.head.kind != "reward_model":
            raise ValueError(f"a {self.head.kind} has no rewards: it can only compare")
        return self.read(rows).squeeze(-1)

    def _read_in_context(self, groups: Sequence[Group]) -> Tensor:
        rows: list[Row] = []
        for group in groups:
            for comparison in group.comparisons:
                first, second = group.answers[comparison.first], group.answers[comparison.second]
                rows += [(group.prompt + second, first), (group.prompt + first, second)]
        values = self.read(rows).reshape(-1, 2)
        return values[:, 0] - values[:, 1]

    def read(self, rows: Sequence[Row]) -> Tensor:
        """The readout [B, W] of each row, fp32."""
        return torch.cat([self._read(part) for part in _portions(rows)])

    def _read(self, rows: Sequence[Row]) -> Tensor:
        device = self.readout.weight.device
        tokens = pad_sequence([torch.tensor(context + answer) for context, answer in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(context) + len(answer) for context, answer in rows], device=device)
        place = torch.arange(tokens.shape[1], device=device)
        mask = place < lengths[:, None]
        if not self.head.likelihood:
            return self._at_the_end(self._encode(tokens, mask), lengths)
        output = self.backbone(tokens, attention_mask=mask.long(), output_hidden_states=True)
        starts = torch.tensor([len(context) for context, _ in rows], device=device)
        judged = mask & (place >= starts[:, None])
        logprobs = -F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
        likelihood = (logprobs * judged[:, 1:]).sum(1)
        return self._at_the_end(output.hidden_states[-1], lengths) + likelihood[:, None] * self.likelihood

    def _encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, T, D]. Padding lies behind, where causal models do not look and others are told not to."""
        hidden: Tensor = self.backbone(tokens, attention_mask=mask.long()).last_hidden_state
        return hidden

    def _at_the_end(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        values: Tensor = self.readout(last.float())
        return values


class Classifier(PreferenceModel):
    """A reward model of `AutoModelForSequenceClassification` with one label, as others publish them."""

    def __init__(self, classifier: nn.Module) -> None:
        nn.Module.__init__(self)
        self.backbone = classifier
        self.head = HeadConfig(kind="reward_model")

    def _read(self, rows: Sequence[Row]) -> Tensor:
        """The model itself finds the last token that is not padding."""
        pad = self.backbone.config.pad_token_id
        sequences = [torch.tensor(context + answer) for context, answer in rows]
        tokens = pad_sequence(sequences, batch_first=True, padding_value=pad).to(self.backbone.device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        logits: Tensor = self.backbone(tokens, attention_mask=mask.long()).logits
        return logits.float()


def _portions(rows: Sequence[Row]) -> list[list[Row]]:
    """Neighbours that take at most `BATCH_TOKENS` when padded."""
    portions: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row[0]) + len(row[1]))
        if not portions or longest * (len(portions[-1]) + 1) > BATCH_TOKENS:
            portions.append([])
            longest = len(row[0]) + len(row[1])
        portions[-1].append(row)
    return portions


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., W] of length 1. The released code trains without and uses with it; here both are one."""
    return F.normalize(vectors, dim=-1)


def skew_score(left: Tensor, right: Tensor) -> Tensor:
    """v^T R w with R block-diagonal of [[0, 1], [-1, 0]], over the last dimension (even).

    Zhang et al. 2024, "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment"
    (arXiv:2410.02197), without the optional scales that depend on the prompt.
    """
    return (left[..., 0::2] * right[..., 1::2] - left[..., 1::2] * right[..., 0::2]).sum(-1)
