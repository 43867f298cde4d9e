"""From prompts to groups of completions: the requests, the wave over the generators, the groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from conf.pipeline import grows_old
from orchestrator.blame import Poisoned
from orchestrator.remote import DEATHS
from orchestrator.seeds import derive_seed
from orchestrator.speculation import Speculation
from orchestrator.types import Completion, FinishReason, GenerationRequest, RolloutGroup, SamplingParams, ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from conf.schema import Config, GeneratorConfig
    from orchestrator.learning import Learning
    from orchestrator.pools import ActorPool
    from orchestrator.tracking import Tracker
    from orchestrator.types import PolicyVersion, Prompt

_GLANCE_S = 1.0  # how long the progress bar waits for generators to say how far they are


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The actors of a run."""

    generators: ActorPool[GenerationRequest, Completion]
    scorers: Mapping[str, ActorPool[RolloutGroup, ScoredGroup]]
    """By kind, of the scorers that need no engine."""
    judges: ActorPool[GenerationRequest, Completion] | None
    """Engines of a judge's own, whose weights never change; None where there is none or the generators serve it."""
    learner: Learning


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How completions of a set of prompts are drawn."""

    purpose: str
    """Names the draw in request ids and seeds ("rollout", "greedy", "sampled")."""
    iteration: int
    num_samples: int
    sampling: SamplingParams


def sampling_of(generator: GeneratorConfig) -> SamplingParams:
    """How the policy is sampled for training."""
    return SamplingParams(
        temperature=generator.temperature,
        top_p=generator.top_p,
        max_tokens=generator.max_tokens,
        stop=tuple(generator.stop),
    )


def make_requests(prompts: Sequence[Prompt], draw: Draw, seed: int) -> list[GenerationRequest]:
    """`num_samples` requests a prompt, those of one prompt side by side; each seed depends on its own name only."""
    requests = []
    for prompt in prompts:
        group_seed = derive_seed(seed, draw.purpose, draw.iteration, prompt.id)
        requests += [
            GenerationRequest(
                id=f"{draw.purpose}/{draw.iteration}/{prompt.id}/{index}",
                prompt_token_ids=prompt.token_ids,
                sampling=draw.sampling,
                seed=derive_seed(group_seed, index),
                cache_scope=f"{draw.purpose}/{draw.iteration}/{prompts[0].id}",  # what is drawn together
            )
            for index in range(draw.num_samples)
        ]
    return requests


def make_groups(
    prompts: Sequence[Prompt], completions: Sequence[Completion], draw: Draw, seed: int
) -> list[RolloutGroup]:
    """Groups completions that came back in the order of `make_requests`."""
    size = draw.num_samples
    return [
        RolloutGroup(
            prompt=prompt,
            completions=tuple(completions[index * size : (index + 1) * size]),
            iteration=draw.iteration,
            seed=derive_seed(seed, draw.purpose, draw.iteration, prompt.id),
        )
        for index, prompt in enumerate(prompts)
    ]


class Rollouts:
    """Samples through the pool of generators.

    A prompt that kills its generators is set aside for the rest of the run. Its completions are aborted ones without
    tokens, on which every judge abstains: it makes no pair, and counts as not solved where it is evaluated.

    Args:
        roles: the actors.
        config: deadlines and the run's seed.
        tracker: shown how far a wave is.
        quarantined: prompts that were set aside, and why; those that kill their generators are added.
    """

    def __init__(self, roles: Roles, config: Config, tracker: Tracker, *, quarantined: dict[str, str]) -> None:
        self._roles = roles
        self._config = config
        self._tracker = tracker
        self.quarantined = quarantined
        """Prompts that were set aside, and why."""
        # Log-probs depend in their last bits on what is computed together: only where time decides about that anyway.
        self._speculation: Speculation[GenerationRequest] | None = (
            Speculation(
                share=config.pipeline.over_issue,
                abandon=lambda actor, share: actor.abort.remote([request.id for request in share]),
            )
            if grows_old(config)
            else None
        )

    def sample(self, prompts: Sequence[Prompt], draws: Sequence[Draw]) -> list[list[RolloutGroup]]:
        """Completes all prompts for each draw, all in one wave; one list of groups a draw."""
        requests = [request for draw in draws for request in make_requests(prompts, draw, self._config.seed)]
        ids = [prompt.id for draw in draws for prompt in prompts for _ in range(draw.num_samples)]
        completions = self.complete(requests, f"{draws[0].purpose}, iteration {draws[0].iteration}", prompt_ids=ids)
        groups, start = [], 0
        for draw in draws:
            size = draw.num_samples * len(prompts)
            groups.append(make_groups(prompts, completions[start : start + size], draw, self._config.seed))
            start += size
        return groups

    def complete(
        self, requests: Sequence[GenerationRequest], what: str, *, prompt_ids: Sequence[str]
    ) -> list[Completion]:
        """Completes requests as one wave, answers in their order; those of quarantined prompts come back aborted.

        Those with the longest beginning in common are asked next to each other.

        Args:
            requests: what is asked.
            what: names the wave in messages.
            prompt_ids: of each request, the prompt that it belongs to.
        """
        wanted = [index for index, prompt_id in enumerate(prompt_ids) if prompt_id not in self.quarantined]
        asked = sorted(wanted, key=lambda index: requests[index].prompt_token_ids)
        found: dict[int, Completion] = {}
        for index, answer in zip(asked, self._ask(requests, asked, what, prompt_ids), strict=True):
            if isinstance(answer, Poisoned):
                self.quarantined[answer.key] = f"it killed {answer.deaths} generators: {answer.last_words}"
            else:
                found[index] = answer
        if len(found) == len(requests):
            return [found[index] for index in range(len(requests))]
        aborted = Completion(
            token_ids=(), text="", logprobs=(), finish_reason=FinishReason.ABORTED, policy=self._version()
        )
        return [found.get(index, aborted) for index in range(len(requests))]

    def _ask(
        self, requests: Sequence[GenerationRequest], asked: Sequence[int], what: str, prompt_ids: Sequence[str]
    ) -> list[Completion | Poisoned]:
        config, before = self._config.generator, self._generated()

        def show() -> None:
            completions, tokens = (now - then for now, then in zip(self._generated(), before, strict=True))
            self._tracker.progress("collect", max(0, completions), len(asked), max(0, tokens))

        return self._roles.generators.map(
            lambda actor, share: actor.generate.remote(share),
            [requests[index] for index in asked],
            what=f"completing {len(asked)} requests ({what})",
            deadline_s=config.deadline_s,
            knob="generator.deadline_s",
            on_tick=show,
            tick_s=self._tracker.interval_s,
            keys=[prompt_ids[index] for index in asked],
            speculation=self._speculation,
        )

    def _version(self) -> PolicyVersion:
        """The weights that the generators answer with."""
        versions: list[PolicyVersion] = self._roles.generators.broadcast(
            lambda actor: actor.version.remote(),
            what="version of its weights",
            deadline_s=self._config.generator.deadline_s,
            knob="generator.deadline_s",
        )
        return versions[0]

    def _generated(self) -> tuple[int, int]:
        """Completions and tokens made so far by the actors that answer now; only drawn on the screen."""
        asked = [actor.generated.remote() for actor in self._roles.generators.actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_GLANCE_S) if asked else ([], [])
        completions = tokens = 0
        for ref in answered:
            try:
                made = ray.get(ref)
            except DEATHS:
                continue  # the wave itself notices a dead actor; the progress bar need not
            completions, tokens = completions + made[0], tokens + made[1]
        return completions, tokens
