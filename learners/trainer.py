"""The learner without Ray: a policy, its reference and its optimizer, from a model folder to published tensors.

    trainer.begin_iteration(1, total_steps=40)
    for pairs in batches(...):
        result = trainer.update(trainer.annotate(pack(pairs)))
    publish(trainer.named_tensors())

On one device and one thread count everything here is deterministic, and a trainer that was saved and loaded goes on
bit for bit as if it had not stopped.

On a CPU an untuned allocator costs up to a third of a step, since large temporaries go back to the system each time:
start the process with glibc's ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` raised to 2^30, or jemalloc.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.core_model_loading import revert_weight_conversion

from learners.checkpoint import read_folder, write_folder
from learners.losses import LossState
from learners.policy import Policy, load_model
from learners.reference import Reference, kl_estimate, snapshot
from learners.replay import Replay
from learners.schedule import learning_rate
from learners.step import optimizer_step
from orchestrator.batching import completion_keys, pack_sequences, split
from orchestrator.errors import ModelError
from orchestrator.types import UpdateResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from conf.schema import LearnerConfig, LossConfig, ReferenceConfig
    from orchestrator.batching import Tokens
    from orchestrator.types import Completion, PreferenceBatch, Prompt, SeedSequence

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MOVING = ("previous", "ema")
"""References that are not the model given, and so are saved."""


class Trainer:
    """Everything of the learner that is not Ray.

    Args:
        model_dir: folder of the initial model.
        loss: the objective.
        reference: what it is anchored to.
        learner: optimizer and memory.
        dtype: "float32" or "bfloat16", of matrix products and published tensors; master weights are fp32.
        keep_initial: hold the initial weights in memory, as `kl_to_initial` needs them.
        seeds: seed data, of which `learner.replay_sequences` are gone over again in every step.
        seed: of the probe that proves packing and of the draws from `seeds`.

    Raises:
        ModelError: the folder holds no model that can be loaded.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        loss: LossConfig,
        reference: ReferenceConfig,
        learner: LearnerConfig,
        dtype: str = "float32",
        keep_initial: bool = False,
        seeds: Sequence[SeedSequence] = (),
        seed: int = 0,
    ) -> None:
        torch.set_num_threads(learner.num_threads)
        self._loss = loss
        self._learner = learner
        self._reference_kind = reference.kind
        model = load_model(model_dir).to("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = Policy(
            model,
            dtype=dtype,
            vocab_chunk=learner.vocab_chunk,
            activation_checkpointing=learner.activation_checkpointing,
            seed=seed,
        )
        self.reference = Reference(self.policy, reference)
        self._initial = snapshot(self.policy) if keep_initial else None
        self._replay = (
            Replay(seeds, per_step=learner.replay_sequences, weight=learner.replay_weight, seed=seed)
            if seeds and learner.replay_sequences
            else None
        )
        self.step = 0
        """Optimizer steps taken in the run."""
        self.version = 0
        """Number of the policy version last published; whoever publishes sets it. Staleness is counted from it."""
        self.iteration = 0
        self._iteration_step = 0
        self._total_steps = 1
        self._loss_state = LossState()
        self._reference_logprobs: dict[bytes, NDArray[np.float32]] = {}
        """Of the iteration's completions, by `completion_keys`."""
        self._optimizer = self._new_optimizer()

    def begin_iteration(self, iteration: int, total_steps: int) -> None:
        """Start an iteration: the reference moves and the schedule starts anew; so do Adam's moments if asked to.

        Called again for the iteration under way, as a resumed controller may, it changes nothing.

        Args:
            iteration: 1 for the first.
            total_steps: optimizer steps it will take, for the schedule.
        """
        if iteration == self.iteration:
            return
        self.reference.begin_iteration()
        self._reference_logprobs.clear()
        if self._learner.reset_optimizer:
            self._optimizer = self._new_optimizer()
        self.iteration, self._iteration_step, self._total_steps = iteration, 0, max(1, total_steps)

    def annotate(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with the reference's log-probs: computed in micro-batches once, remembered for later epochs."""
        keys = completion_keys(batch)
        if not all(key in self._reference_logprobs for key in keys):
            parts = split(batch, self._learner.micro_batch_tokens)
            logprobs = np.concatenate([self.reference.logprobs(part).cpu().numpy() for part in parts])
            pieces = np.split(logprobs, np.cumsum(batch.completion_lengths)[:-1])
            for key, piece in zip(keys, pieces, strict=True):
                self._reference_logprobs.setdefault(key, piece)
        found = np.concatenate([self._reference_logprobs[key] for key in keys])
        return replace(batch, reference_logprobs=found)

    def update(self, batch: PreferenceBatch) -> UpdateResult:
        """Take one optimizer step on an annotated batch.

        Raises:
            ValueError: the batch has no reference log-probs.
            TrainingError: loss or gradient norm is not finite; nothing was changed.
        """
        lr = learning_rate(
            peak=self._learner.lr,
            schedule=self._learner.schedule,
            step=self._iteration_step,
            total_steps=self._total_steps,
            warmup_steps=self._learner.warmup_steps,
        )
        metrics, self._loss_state = optimizer_step(
            self.policy,
            self._optimizer,
            batch,
            loss=self._loss,
            learner=self._learner,
            lr=lr,
            version=self.version,
            state=replace(self._loss_state, progress=min(1.0, self._iteration_step / self._total_steps)),
            replay=partial(self._replay.backward, self.policy, self.step) if self._replay else None,
        )
        self.step += 1
        self._iteration_step += 1
        return UpdateResult(
            step=self.step, batch=batch.number, pair_ids=batch.pair_ids, tokens=batch.num_tokens, metrics=metrics
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs of ``sequence[1:]`` given their prefixes under the policy, each [len(sequence) - 1]."""
        return self._score(None, [(tuple(sequence[:1]), tuple(sequence[1:])) for sequence in sequences])

    def reference_logprobs(self, sequences: Sequence[tuple[Tokens, Tokens]]) -> list[NDArray[np.float32]] | None:
        """Log-probs of the completions of (prompt, completion) sequences under the latest iteration's reference.

        None before the first iteration, and where there is no reference.
        """
        if self.iteration == 0 or not self.reference.parameters:
            return None
        return self._score(self.reference.parameters, sequences)

    def kl_to_initial(self, samples: Sequence[tuple[Prompt, Completion]]) -> float:
        """KL(policy || initial model) in nats a completion; both sides computed here, so no engine's rounding counts.

        Args:
            samples: prompts and completions that the current policy sampled at temperature 1, untruncated.

        Raises:
            ValueError: no samples, or the trainer was built without `keep_initial`.
        """
        if self._initial is None or not samples:
            raise ValueError("kl_to_initial needs samples and a trainer built with keep_initial=True")
        sequences = [(prompt.token_ids, completion.token_ids) for prompt, completion in samples]
        policy, initial = (
            torch.from_numpy(np.concatenate(self._score(parameters, sequences))) for parameters in (None, self._initial)
        )
        return float(kl_estimate(policy, initial).sum()) / len(samples)

    def _score(
        self, parameters: Mapping[str, Tensor] | None, sequences: Sequence[tuple[Tokens, Tokens]]
    ) -> list[NDArray[np.float32]]:
        """Token log-probs of (prompt, completion) sequences under some parameters, or the live ones."""
        results = []
        for part in _portions(sequences, self._learner.micro_batch_tokens):
            columns, index = pack_sequences(part)
            logprobs = self.policy.logprobs_with(parameters, columns).cpu().numpy()
            completions = np.split(logprobs, np.cumsum(columns.completion_lengths)[:-1])
            results += [completions[number] for number in index]
        return results

    def named_tensors(self) -> dict[str, Tensor]:
        """The policy by the names of a Hugging Face checkpoint, contiguous, in the publishing dtype, tied weights once.

        On the policy's device. With float32 they share memory with the live weights: copy or send them before the
        next update.
        """
        state = {}
        seen = set()
        for name, tensor in self.policy.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor.detach().to(self.policy.dtype) if tensor.is_floating_point() else tensor.detach()
        state = revert_weight_conversion(self.policy.model, state)
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def save(self, folder: str | Path) -> None:
        """Write weights, optimizer, reference and counters; the folder appears whole or not at all."""
        tensors: dict[str, Mapping[str, Tensor]] = {
            "weights": self.policy.parameters_by_name(),
            "optimizer": {
                f"{moment}.{name}": self._optimizer.state[parameter][moment]
                for name, parameter in self.policy.parameters_by_name().items()
                for moment in _MOMENTS
                if parameter in self._optimizer.state
            },
        }
        if self._reference_kind in _MOVING:
            tensors["reference"] = self.reference.parameters
        facts = {"reference": self._reference_kind, "loss_state": asdict(self._loss_state), **self._counters()}
        write_folder(folder, tensors, facts)

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote; the trainer must be built from the same model folder and configuration.

        Raises:
            ModelError: the folder is damaged, or of another model or reference kind; the trainer must not be used then.
        """
        tensors, facts = read_folder(folder)
        if facts["reference"] != self._reference_kind:
            raise ModelError(
                f"{folder} was saved with reference.kind={facts['reference']}; this run has {self._reference_kind}"
            )
        live = self.policy.parameters_by_name()
        _copy(tensors["weights"], live, folder)
        if self._reference_kind in _MOVING:
            _copy(tensors["reference"], self.reference.parameters, folder)
        self._optimizer = self._new_optimizer()
        for name, parameter in live.items():
            if f"step.{name}" in tensors["optimizer"]:
                # Adam counts its steps on the CPU; its moments lie with the parameter.
                moments = {moment: tensors["optimizer"][f"{moment}.{name}"] for moment in _MOMENTS}
                self._optimizer.state[parameter] = {
                    moment: value if moment == "step" else value.to(parameter.device)
                    for moment, value in moments.items()
                }
        self.step, self.version, self.iteration = facts["step"], facts["version"], facts["iteration"]
        self._iteration_step, self._total_steps = facts["iteration_step"], facts["total_steps"]
        remembered = facts["loss_state"]
        self._loss_state = LossState(**remembered | {"margins": tuple(remembered["margins"])})

    def _counters(self) -> dict[str, int]:
        return {
            "step": self.step,
            "version": self.version,
            "iteration": self.iteration,
            "iteration_step": self._iteration_step,
            "total_steps": self._total_steps,
        }

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, norms and biases do not."""
        parameters = list(self.policy.parameters_by_name().values())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self._learner.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self._learner.lr, betas=(self._learner.adam_beta1, self._learner.adam_beta2)
        )


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor], folder: str | Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in target.items()}:
        raise ModelError(f"{folder} was saved from another model: its tensors differ in names or shapes")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _portions(sequences: Sequence[tuple[Tokens, Tokens]], max_tokens: int) -> list[list[tuple[Tokens, Tokens]]]:
    """Neighbours of at most `max_tokens` together, at least one each; shared prompts are counted each time."""
    portions: list[list[tuple[Tokens, Tokens]]] = []
    room = 0
    for sequence in sequences:
        size = len(sequence[0]) + len(sequence[1])
        if not portions or size > room:
            portions.append([])
            room = max_tokens
        portions[-1].append(sequence)
        room -= size
    return portions
