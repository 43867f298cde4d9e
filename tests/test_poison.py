"""A prompt that kills its generators is set aside, and changes nothing for the others."""

from types import SimpleNamespace

import numpy as np
import pytest
import ray

from actors.engine_loop import EngineLoop
from actors.generator import Generator
from conf.compose import compose
from conf.schema import TaskConfig
from orchestrator.accounts import Accounts
from orchestrator.archive import Archive
from orchestrator.blame import Poisoned
from orchestrator.evaluation import accuracy, evaluate
from orchestrator.events import EventKind, ignore
from orchestrator.iteration import keep_answers
from orchestrator.ledger import Ledger
from orchestrator.metrics import rollout_metrics
from orchestrator.pools import ActorPool
from orchestrator.rollouts import Draw, Roles, Rollouts, make_requests, sampling_of
from orchestrator.scoring import PooledTextModel
from orchestrator.store import Store, read_rollouts
from orchestrator.tally import Tally
from orchestrator.tracking import Tracker
from orchestrator.types import Completion, FinishReason, Prompt, Score, ScoredGroup
from tests.fakes import POISON, DyingEngine
from tests.records import V1


class Fragile(Generator):
    def __init__(self, name):
        self.name = name
        self._loop = EngineLoop(DyingEngine())
        self._loop.hold(V1)


CONFIG = compose([])
DRAW = Draw(purpose="rollout", iteration=1, num_samples=1, sampling=sampling_of(CONFIG.generator))


def prompts(*poisoned):
    return [
        Prompt(id=f"p{index}", text=str(index), token_ids=(1, POISON if index in poisoned else 2), answer="x")
        for index in range(8)
    ]


@pytest.fixture
def rollouts(ray_cluster):
    """Of two fragile generators."""
    events, quarantined = [], {}

    def make(index):
        return ray.remote(Fragile).options(num_cpus=0.1).remote(f"generator-{index}")

    pool = ActorPool(role="generator", make=make, num_actors=2, restarts=10, start_deadline_s=60, emit=events.append)
    pool.wait_ready()
    roles = Roles(generators=pool, scorers={}, judges=None, learner=None)
    return Rollouts(roles, CONFIG, Tracker(), quarantined=quarantined), pool, events, quarantined


def test_a_prompt_that_kills_its_engine_is_set_aside_and_not_asked_again(rollouts):
    rollouts, pool, events, quarantined = rollouts
    (clean,) = rollouts.sample(prompts(), [DRAW])
    (groups,) = rollouts.sample(prompts(5), [DRAW])
    assert groups[5].completions == (
        Completion(token_ids=(), text="", logprobs=(), finish_reason=FinishReason.ABORTED, policy=V1),
    )
    assert groups[:5] + groups[6:] == clean[:5] + clean[6:]
    assert [event.kind for event in events].count(EventKind.LOST) == 3
    (told,) = [event for event in events if event.kind is EventKind.QUARANTINED]
    assert told.text.startswith("p5 is set aside: generator-")
    assert pool.restarts_left == 10
    assert list(quarantined) == ["p5"]
    assert quarantined["p5"].startswith("it killed 3 generators: ")
    deaths = len(events)
    (again,) = rollouts.sample(prompts(5), [DRAW])
    assert again == groups
    assert len(events) == deaths


def test_prompts_that_kill_at_the_same_time_are_all_found_within_the_budget(rollouts):
    """Each of the two workers has one: their deaths must not use up the budget before the culprits are known."""
    rollouts, pool, _, quarantined = rollouts
    (groups,) = rollouts.sample(prompts(4, 5), [DRAW])
    assert sorted(quarantined) == ["p4", "p5"]
    assert [group.completions[0].finish_reason is FinishReason.ABORTED for group in groups] == [
        *[False] * 4,
        *[True] * 2,
        *[False] * 2,
    ]
    assert pool.restarts_left == 10


def test_a_question_that_kills_its_judge_has_no_answer_and_the_others_have_theirs(rollouts):
    from launch.tiny import make_tokenizer  # here, since the actors load this module as well

    _, pool, _, _ = rollouts
    judge = PooledTextModel(
        pool, make_tokenizer(64), version=lambda: "v1", template=TaskConfig(), max_length=64, deadline_s=120
    )
    asked = make_requests(prompts(5), DRAW, seed=0)
    replies = judge.generate(asked)
    assert [reply.finish_reason for reply in replies].count(FinishReason.ABORTED) == 1
    assert (replies[5].finish_reason, replies[5].text) == (FinishReason.ABORTED, "")
    read = judge.logprobs([(prompt.token_ids, (7, 2)) for prompt in prompts(5)])
    assert [values.tolist() for values in read[:5] + read[6:]] == [[-1.0, -1.0]] * 7
    assert read[5].shape == (2,)
    assert np.isnan(read[5]).all()
    assert pool.restarts_left == 10


class Pool:
    """Set aside is what belongs to p5; everything else is answered."""

    actors = ()

    def map(self, call, work, *, keys, **_):
        answer = Completion(token_ids=(7, 2), text="x", logprobs=(0.0, 0.0), finish_reason=FinishReason.EOS, policy=V1)
        return [Poisoned(key=key, deaths=3, last_words="gone") if key == "p5" else answer for key in keys]

    def broadcast(self, call, **_):
        return [V1]


class Strict:
    """Gives 1 to everything but what was aborted."""

    reports = 0

    def score(self, groups):
        return [
            ScoredGroup(group=group, scores=tuple(map(self.value, group.completions)), scorer="strict@1")
            for group in groups
        ]

    def metrics(self):
        self.reports += 1
        return Tally()

    def value(self, completion):
        aborted = completion.finish_reason is FinishReason.ABORTED
        return Score(value=None, reason="aborted") if aborted else Score(value=1.0)


def test_what_was_set_aside_counts_as_not_solved_and_is_kept_with_the_reason(tmp_path):
    roles = Roles(generators=Pool(), scorers={}, judges=None, learner=None)
    rollouts = Rollouts(roles, CONFIG, Tracker(), quarantined={})
    examiner = Strict()
    found = evaluate(rollouts, examiner, prompts(5), CONFIG, 1)
    assert examiner.reports == 1, "else what it says here would be told of the training data"
    assert (found.greedy.value, found.sampled.value, found.greedy.n) == (7 / 8, 7 / 8, 8)
    assert (found.abstained, found.tokens) == (2, 2 * 7 * 2)
    assert [prompt.id for prompt, _ in found.sampled_completions] == ["p0", "p1", "p2", "p3", "p4", "p6", "p7"]
    (groups,) = rollouts.sample(prompts(5), [DRAW])
    scored = Strict().score(groups)
    assert accuracy(scored).value == 7 / 8
    assert rollout_metrics(scored)["rollout/abstained_fraction"] == pytest.approx(1 / 8)
    with Ledger(tmp_path) as ledger:
        accounts, store = Accounts(ledger), Store(tmp_path)
        archive = Archive(tmp_path, accounts, ignore)
        context = SimpleNamespace(store=store, ledger=ledger, accounts=accounts, archive=archive, rollouts=rollouts)
        keep_answers(context, 1, found)
        assert list(accounts.quarantined()) == ["p5"], "else a resumed run would ask it again"
    Store(tmp_path).write_rollouts(1, 0, scored)
    assert read_rollouts(tmp_path / "rollouts" / "iteration-0001-wave-0000.parquet") == scored
