"""The learner without Ray: a policy, its reference and its optimizer, from a model folder to published tensors.

    trainer.begin_iteration(1, total_steps=40)
    for pairs in batches(...):
        result = trainer.update(trainer.annotate(pack(pairs)))
    publish(trainer.named_tensors())

On one device and one thread count everything here is deterministic, and a trainer that was saved and loaded goes on
bit for bit as if it had not stopped.

On a CPU an untuned allocator costs up to a third of a step, since large temporaries go back to the system each time:
the learner's actor is started with glibc's thresholds raised (`launch/environment.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.core_model_loading import revert_weight_conversion

from learners.checkpoint import Checkpoint, State, write_folder
from learners.losses import LossState
from learners.memory import halved, within_memory
from learners.optimizer import add_moments, moments, new_optimizer
from learners.policy import Policy, load_model
from learners.reference import Reference, ReferenceLogprobs, kl_estimate, snapshot
from learners.replay import Replay
from learners.schedule import learning_rate
from learners.scoring import token_logprobs
from learners.spikes import RECENT, largest_norm
from learners.step import optimizer_step
from orchestrator.errors import ModelError, TrainingError
from orchestrator.types import UpdateResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from conf.schema import LearnerConfig, LossConfig, ReferenceConfig
    from orchestrator.batching import Tokens
    from orchestrator.types import Completion, PreferenceBatch, Prompt, SeedSequence

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
            logits_mb=learner.logits_mb,
            activation_checkpointing=learner.activation_checkpointing,
            flex=learner.flex_attention,
            seed=seed,
        )
        self.reference = Reference(self.policy, reference)
        self._initial = snapshot(self.policy) if keep_initial else None
        self._replay = (
            Replay(seeds, per_step=learner.replay_sequences, weight=learner.replay_weight, seed=seed)
            if seeds and learner.replay_sequences
            else None
        )
        self._is_as_saved = False
        """Whether the model is known to hold its tensors as a checkpoint has them."""
        self.step = 0
        """Batches consumed in the run: optimizer steps taken and batches skipped."""
        self.version = 0
        """Number of the policy version last published; whoever publishes sets it. Staleness is counted from it."""
        self.iteration = 0
        self.batches_done = 0
        """Batches of the iteration consumed, skipped ones among them."""
        self._total_steps = 1
        self._skipped = 0
        self._norms: deque[float] = deque(maxlen=RECENT)
        self._micro_batch_tokens = learner.micro_batch_tokens
        self._notes: list[str] = []
        self._loss_state = LossState()
        self._reference_logprobs = ReferenceLogprobs(self.reference)
        self._optimizer = new_optimizer(self.policy.parameters_by_name(), learner)

    def begin_iteration(self, iteration: int, total_steps: int) -> int:
        """Start an iteration: the reference moves and the schedule starts anew; so do Adam's moments if asked to.

        Called again for the iteration under way, as a resumed controller may, it changes nothing.

        Args:
            iteration: 1 for the first.
            total_steps: batches it will take, for the schedule.

        Returns:
            How many of those are done: 0 unless the iteration is under way.
        """
        if iteration != self.iteration:
            self.reference.begin_iteration()
            self._reference_logprobs.clear()
            if self._learner.reset_optimizer:
                self._optimizer = new_optimizer(self.policy.parameters_by_name(), self._learner)
            self.iteration, self.batches_done, self._total_steps = iteration, 0, max(1, total_steps)
            self._skipped = 0
        return self.batches_done

    def annotate(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with the reference's log-probs: computed in micro-batches once, remembered for later epochs.

        A batch that came with them is returned as it is.
        """
        if batch.reference_logprobs is not None:
            return batch
        annotated, tokens = within_memory(
            lambda tokens: self._reference_logprobs.annotate(batch, tokens), batch, self._micro_batch_tokens
        )
        self._fits(tokens)
        return annotated

    def update(self, batch: PreferenceBatch) -> UpdateResult:
        """Consume an annotated batch: take an optimizer step, or skip it where loss or gradient forbid one.

        A batch that is skipped leaves weights, optimizer and the objective's memory as they were, to the bit.

        Raises:
            ValueError: the batch has no reference log-probs.
            TrainingError: more than `learner.max_skipped` batches of the iteration were skipped, this one the last.
            RuntimeError, MemoryError: memory does not suffice for a single prompt group; nothing was changed.
        """
        lr = learning_rate(
            peak=self._learner.lr,
            schedule=self._learner.schedule,
            step=self.batches_done,
            total_steps=self._total_steps,
            warmup_steps=self._learner.warmup_steps,
        )
        taken = optimizer_step(
            self.policy,
            self._optimizer,
            batch,
            loss=self._loss,
            learner=replace(self._learner, micro_batch_tokens=self._micro_batch_tokens),
            lr=lr,
            version=self.version,
            state=replace(self._loss_state, progress=min(1.0, self.batches_done / self._total_steps)),
            replay=partial(self._replay.backward, self.policy, self.step) if self._replay else None,
            largest_norm=largest_norm(self._norms, self._learner.spike_factor),
        )
        self._fits(taken.micro_batch_tokens)
        self.step += 1
        self.batches_done += 1
        notes, self._notes = tuple(self._notes), []
        result = UpdateResult(
            step=self.step,
            batch=batch.number,
            pair_ids=batch.pair_ids,
            tokens=batch.num_tokens,
            metrics=taken.metrics,
            skipped=taken.skipped,
            notes=notes,
        )
        if taken.skipped:
            self._count_skipped(result)
        else:
            self._loss_state = taken.state
            self._norms.append(taken.metrics["grad_norm"])
        return result

    def _count_skipped(self, result: UpdateResult) -> None:
        self._skipped += 1
        if self._skipped > self._learner.max_skipped:
            raise TrainingError(
                f"iteration {self.iteration}: {self._skipped} batches were skipped, more than learner.max_skipped="
                f"{self._learner.max_skipped}. Batch {result.batch} of {len(result.pair_ids)} pairs (first"
                f" {result.pair_ids[0]}): {result.skipped}. Lower learner.lr or raise loss.beta, and look at the pairs'"
                " log-probs.",
                (result,),
            )

    def _fits(self, tokens: int) -> None:
        """Memory sufficed for micro-batches of so many tokens, and not for more."""
        if tokens != self._micro_batch_tokens:
            self._notes.append(halved(self._micro_batch_tokens, tokens))
            self._micro_batch_tokens = tokens

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
        return token_logprobs(self.policy, parameters, sequences, self._micro_batch_tokens)

    def named_tensors(self) -> dict[str, Tensor]:
        """The policy by the names of a Hugging Face checkpoint, contiguous, in the publishing dtype, tied weights once.

        In the order of the model's layers, so that what an engine fuses (query, key and value) lies side by side.
        On the policy's device. With float32 they share memory with the live weights: copy or send them before the
        next update.
        """
        state = {}
        seen = set()
        for name, tensor in self.policy.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor.detach().to(self.policy.dtype) if tensor.is_floating_point() else tensor.detach()
        # It sorts them, and takes a millisecond to find that most models need no conversion.
        published = state if self._is_as_saved else revert_weight_conversion(self.policy.model, state)
        self._is_as_saved = published.keys() == state.keys() and all(
            published[name] is tensor for name, tensor in state.items()
        )
        order = (*(name for name in state if name in published), *(name for name in published if name not in state))
        return {name: published[name].contiguous() for name in order}

    def state(self) -> State:
        """What `load` goes on from. It shares memory with what is trained: write or copy it before the next update."""
        live = self.policy.parameters_by_name()
        tensors: dict[str, Mapping[str, Tensor]] = {
            "weights": live,
            "optimizer": moments(self._optimizer, live),
            "reference_logprobs": self._reference_logprobs.tensors(),
        }
        if self._reference_kind in _MOVING:
            tensors["reference"] = self.reference.parameters
        facts = {
            "reference": self._reference_kind,
            "step": self.step,
            "version": self.version,
            "iteration": self.iteration,
            "batches_done": self.batches_done,
            "total_steps": self._total_steps,
            "skipped": self._skipped,
            "grad_norms": list(self._norms),
            "micro_batch_tokens": {"given": self._learner.micro_batch_tokens, "used": self._micro_batch_tokens},
            "loss_state": asdict(self._loss_state),
        }
        return State(tensors=tensors, facts=facts)

    def save(self, folder: str | Path) -> str:
        """Write the state and wait until it is durable; see `write_folder` for what is returned and raised."""
        return write_folder(folder, self.state())

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint, bit for bit as the trainer that wrote it would have.

        The trainer must be built from the same model folder and configuration.

        Raises:
            ModelError: the folder is damaged, or of another model or reference kind; the trainer must not be used then.
        """
        saved = Checkpoint(folder)
        facts: dict[str, Any] = saved.facts
        if facts["reference"] != self._reference_kind:
            raise ModelError(
                f"{folder} was saved with reference.kind={facts['reference']}; this run has {self._reference_kind}"
            )
        live = self.policy.parameters_by_name()
        saved.load_into("weights", live)
        if self._reference_kind in _MOVING:
            saved.load_into("reference", self.reference.parameters)
        self._optimizer = new_optimizer(live, self._learner)
        saved.load_into("optimizer", add_moments(self._optimizer, live, saved.names("optimizer")))
        self._reference_logprobs.restore(saved.read("reference_logprobs"))
        self.step, self.version, self.iteration = facts["step"], facts["version"], facts["iteration"]
        self.batches_done, self._total_steps = facts["batches_done"], facts["total_steps"]
        self._skipped = facts["skipped"]
        self._norms = deque(facts["grad_norms"], maxlen=RECENT)
        tokens = facts["micro_batch_tokens"]
        if tokens["given"] == self._learner.micro_batch_tokens:  # else people have changed it since
            self._micro_batch_tokens = tokens["used"]
        remembered = facts["loss_state"]
        self._loss_state = LossState(**remembered | {"margins": tuple(remembered["margins"])})
