"""Tree search over many prompts at once against decoding one node at a time, and how often prefixes are computed.

    python -m benchmarks.search

A random Llama of 13M parameters, prompts of 200 tokens, rollouts of up to 128 tokens whose steps are 32 tokens long on
average, 16 rollouts a prompt, float32, one thread, through the collector of `search=mcts`, a pool and vLLM in an actor.

    together     64 prompts, 4 rollouts of each tree in flight
    one by one   the same search of 2 prompts, one after the other, one rollout in flight

The other ratio: tokens of prompts and states that the engine computed, over those that differ (a shared prefix counts
once). The prefix cache is empty to begin with.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import numpy as np
import ray

from actors.generator import Generator
from benchmarks.generation import start_pool
from benchmarks.models import VOCABULARY, make_llama
from benchmarks.report import Comparison, in_turn, of_medians, report
from conf.compose import compose
from orchestrator.pools import ActorPool
from orchestrator.rollouts import Rollouts
from orchestrator.searching import TreeCollector
from orchestrator.store import Store
from orchestrator.tally import Tally
from orchestrator.tracking import Tracker
from orchestrator.types import Completion, GenerationRequest, PolicyVersion, Prompt, Score, ScoredGroup
from orchestrator.waves import Wave

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.prompts import PromptTokenizer
    from orchestrator.types import RolloutGroup

PROMPTS, SINGLE, PROMPT_TOKENS, STEP_TOKENS, MAX_TOKENS = 64, 2, 200, 32, 128
WAIT_S = 600.0
ENGINE = {"max_length": 512, "max_num_seqs": 256, "kv_cache_mb": 1024}
VERSION = PolicyVersion(number=0, digest="0" * 16)
SETTINGS = ["search=mcts", "search.simulations=16", f"generator.max_tokens={MAX_TOKENS}", "model.max_length=512"]


class CountingGenerator(Generator):
    """A generator that remembers which prompts it was given and how much of each was in its prefix cache."""

    def __init__(self, *arguments: Any) -> None:
        from actors import vllm_engine

        self._seen: list[tuple[tuple[int, ...], int]] = []
        complete = vllm_engine._completion

        def noted(output: Any) -> Any:
            self._seen.append((tuple(output.prompt_token_ids), output.num_cached_tokens))
            return complete(output)

        mock.patch.object(vllm_engine, "_completion", noted).start()
        super().__init__(*arguments)

    async def begin(self) -> None:
        """Nothing is cached and nothing was seen."""
        self._seen.clear()
        await asyncio.wrap_future(self._loop.call(lambda engine: cast("Any", engine).drop_caches()))

    async def prefixes(self) -> tuple[int, int]:
        """Tokens of prompts that were computed, and those that differ."""
        computed = sum(len(prompt) - cached for prompt, cached in self._seen)
        tree: dict[int, Any] = {}
        different = 0
        for prompt, _ in self._seen:
            place = tree
            for token in prompt:
                if token not in place:
                    place[token] = {}
                    different += 1
                place = place[token]
        return computed, different


class Words:
    """One token in `STEP_TOKENS` ends a step."""

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        """A letter a token."""
        return "".join("\n" if token % STEP_TOKENS == 0 else "x" for token in tokens)


class Parity:
    """A judge without a model."""

    name = "parity@1"

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """By the last token of each completion."""
        return [
            ScoredGroup(
                group=group,
                scores=tuple(Score(value=float(one.token_ids[-1] % 2)) for one in group.completions),
                scorer=self.name,
            )
            for group in groups
        ]

    def metrics(self) -> Tally:
        """None."""
        return Tally()


def search(
    pool: ActorPool[GenerationRequest, Completion],
    prompts: Sequence[Prompt],
    folder: Path,
    ratios: list[float],
    *,
    in_flight: int,
    at_once: int,
) -> float:
    """Rollouts a second; notes how much of the prefixes was computed."""
    (generator,) = pool.actors
    ray.get(generator.begin.remote(), timeout=WAIT_S)
    config = compose([*SETTINGS, f"search.in_flight={in_flight}"])
    rollouts = Rollouts(cast("Any", SimpleNamespace(generators=pool)), config, Tracker(), quarantined={})
    collector = TreeCollector(
        config, rollouts, Parity(), Store(folder), cast("PromptTokenizer", Words()), quarantined=()
    )
    start, expanded = time.perf_counter(), 0
    for wave in range(0, len(prompts), at_once):
        asked = prompts[wave : wave + at_once]
        found = collector.collect(Wave(iteration=1, number=wave, prompts=asked, policies=None, reference=VERSION))
        expanded += sum(len(scored.scores) for scored in found.scored)
    seconds = time.perf_counter() - start
    computed, different = ray.get(generator.prefixes.remote(), timeout=WAIT_S)
    ratios.append(computed / different)
    return expanded / seconds


def main() -> int:
    """Measures and keeps both ratios."""
    random = np.random.default_rng(0)
    prompts = [
        Prompt(id=str(number), text="", token_ids=tuple(random.integers(3, VOCABULARY, PROMPT_TOKENS).tolist()))
        for number in range(PROMPTS)
    ]
    together: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_llama(folder / "model", hidden=256, layers=6, heads=4)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        pool = start_pool(model, engine=ENGINE, actor=CountingGenerator)
        rates = in_turn(
            {
                "together": partial(search, pool, prompts, folder, together, in_flight=4, at_once=PROMPTS),
                "one by one": partial(search, pool, prompts[:SINGLE], folder, [], in_flight=1, at_once=1),
            }
        )
        ray.shutdown()
    notes = __doc__.partition("    python")[2].partition("\n")[2].strip()
    speed = report(
        Comparison(
            key="search_vs_sequential",
            title="Search of many trees at once",
            unit="rollouts/s",
            sides=rates,
            ratio=of_medians(rates["together"], rates["one by one"]),
            least=8.0,
            notes=notes,
        )
    )
    again = report(
        Comparison(
            key="prefix_recompute",
            title="Prefixes computed by a search of many trees at once",
            unit="computed / different",
            sides={"together": together[1:]},
            ratio=float(np.median(together[1:])),
            most=1.1,
            notes="The same runs.",
        )
    )
    return speed or again


if __name__ == "__main__":
    sys.exit(main())
