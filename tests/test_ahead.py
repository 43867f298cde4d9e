"""What is collected ahead is no older than the bound, is made once, and holds up nobody who has no use for it."""

import threading
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.compose import compose
from orchestrator.ahead import Ahead
from orchestrator.context import Context, Stage
from orchestrator.errors import DataError, JudgeError, PoolError, WeightsLostError
from orchestrator.floor import Floor
from orchestrator.prompts import PromptStream
from orchestrator.remote import fetch
from orchestrator.tasks.addition import AdditionTask
from orchestrator.tracking import Tracker
from orchestrator.types import PolicyVersion, Prompt
from orchestrator.waits import Unwanted, check_wanted, work_until
from orchestrator.waves import Harvest
from tests.records import completion, pair

DEADLINE_S = 20.0


def version(number):
    return PolicyVersion(number=number, digest=f"{number:016x}")


def lineage(versions, reference=None):
    return SimpleNamespace(latest=tuple(versions), reference=reference or version(0))


class Run:
    """As much of a run as collecting ahead needs; the published weights sample whatever is asked for."""

    def __init__(self, mode="async", bound=1, iterations=6):
        self.config = compose(
            [f"pipeline.mode={mode}", f"pipeline.iterations={iterations}", "pipeline.prompts_per_iteration=4"]
            + [f"pipeline.max_staleness={bound}"] * (mode == "async")
            + ["pipeline.wave_prompts=2"]
        )
        self.floor, self.bench, self.tracker = Floor(), Floor(), Tracker()
        self.accounts = SimpleNamespace(quarantined=self._quarantined)
        self.asked_before = []
        self.prompts = PromptStream(AdditionTask(), self._render, max_length=256, max_tokens=64)
        self.publisher = SimpleNamespace(is_published=True, version=version(0))
        self.learning = SimpleNamespace(undo=lambda number: self.undone.append(number) or True)
        self.waves = SimpleNamespace(draw=self.draw, collect=self.sample, are_committed=lambda waves: True)
        self.ledger = SimpleNamespace(finished_phase=lambda number, phase: self.noted.get((number, phase)))
        self.noted = {}
        self.undone, self.published, self.sampled, self.pairs, self.drawn = [], [], [], [], []
        self.finished = 0
        self.break_off = {}

    alone = Context.alone

    def _render(self, problem):
        return Prompt(id=problem.id, text=problem.content, token_ids=(1, 5))

    def _quarantined(self, before):
        self.asked_before.append(before)
        return {}

    def publish(self, number, iteration):
        self.published.append(number)

    def stage(self, name, iteration, *, quietly):
        self.sampled.append((iteration, self.finished, threading.current_thread() is threading.main_thread()))
        assert quietly != self.sampled[-1][2]
        return nullcontext(Stage(name=name))

    def draw(self, wave):
        self.drawn.append((wave.iteration, wave.number))
        return 10

    def sample(self, wave):
        if error := self.break_off.pop((wave.iteration, wave.number), None):
            raise error
        by = self.publisher.version
        if wave.policies is not None and by not in wave.policies:
            raise AssertionError(f"{by} may not sample {wave}")
        made = [
            replace(pair(completion(1), completion(2)), id=f"{wave.iteration}/{prompt.id}", reference=wave.reference)
            for prompt in wave.prompts
        ]
        return Harvest(pairs=made, tokens=1, sampled_by=frozenset([by.digest]))

    def go(self, ahead, numbers, versions):
        """The controller's loop; every iteration is trained on for a while and promotes a version."""
        found = []
        for number in numbers:
            ahead.go_on(number, lineage(versions, version(99)))
            found.append(ahead.take(number))
            self.pairs.append([list(part) for part in found[-1]])
            time.sleep(0.01)
            self.publisher.version = version(number)
            versions.append(version(number))
            self.finished = number
        return found


@pytest.mark.parametrize("mode", ["sync", "semi_online", "async"])
@pytest.mark.parametrize("committed", [True, False])
def test_what_an_earlier_process_collected_is_what_the_ledger_says_of_it(mode, committed):
    """Read back it took no time worth the name, and no token was drawn: that is not what the iteration took."""
    run = Run(mode=mode, iterations=1)
    run.noted[1, "collect"] = SimpleNamespace(seconds=7.0, tokens=300)
    run.waves.are_committed = lambda waves: committed
    run.waves.draw, collect = lambda wave: 0, run.waves.collect
    run.waves.collect = lambda wave: replace(collect(wave), tokens=0 if committed else 1)
    with closing(Ahead(run)) as ahead:
        (found,) = run.go(ahead, [1], [version(0)])
    assert (found.stage.seconds, found.stage.tokens) == ((7.0, 300) if committed else (0.0, 2))
    assert len(run.sampled) == (not committed), "the stage is begun anew"


def wait_until(holds):
    end = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_an_iteration_is_collected_as_soon_as_the_bound_allows_and_no_sooner(bound):
    run = Run(bound=bound)
    with closing(Ahead(run)) as ahead:
        found = run.go(ahead, range(1, 7), [version(0)])
    assert [number for number, _, _ in run.sampled] == [1, 2, 3, 4, 5, 6], "each once, in order"
    assert all(finished >= number - 1 - bound for number, finished, _ in run.sampled)
    assert any(finished < number - 1 for number, finished, _ in run.sampled) == (bound > 0)
    assert {by_main for _, _, by_main in run.sampled} == {False}
    ids = [pair.id for parts in run.pairs for part in parts for pair in part]
    assert len(ids) == len(set(ids)) == 24
    assert [each.cursor for each in found] == [4, 8, 12, 16, 20, 24]
    assert {pair.reference for parts in run.pairs for part in parts for pair in part} == {version(99)}
    assert all(len(parts) == 1 for parts in run.pairs)
    assert run.asked_before == [number - bound for number in range(1, 7)]
    assert run.published == []


def test_the_next_wave_is_drawn_while_one_is_judged_and_no_further():
    run, seen = Run(mode="sync"), []
    run.config = compose(["pipeline.iterations=1", "pipeline.prompts_per_iteration=6", "pipeline.wave_prompts=2"])
    judge = run.waves.collect

    def collect(wave):
        wait_until(lambda: (1, min(wave.number + 1, 2)) in run.drawn)  # goes on beside this
        seen.append((wave.number, list(run.drawn)))
        return judge(wave)

    run.waves.collect = collect
    with closing(Ahead(run)) as ahead:
        ahead.go_on(1, lineage([version(0)]))
        found = ahead.take(1)
        list(found)
    drawn = [(1, 0), (1, 1), (1, 2)]
    assert seen == [(0, drawn[:2]), (1, drawn), (2, drawn)]
    assert found.harvest.tokens == 3 * (1 + 10), "what was drawn beforehand is counted"


@pytest.mark.parametrize("settings", [["recipe=self_rewarding"], ["recipe=mcts_dpo"], ["scorer=implicit"]])
def test_nothing_is_drawn_beforehand_where_the_policy_judges(settings):
    run = Run(mode="sync")
    run.config = compose([*settings, "pipeline.iterations=1", "pipeline.wave_prompts=2"])
    with closing(Ahead(run)) as ahead:
        ahead.go_on(1, lineage([version(0)]))
        list(ahead.take(1))
    assert (run.drawn, len(run.sampled)) == ([], 1)


def test_an_error_of_a_judge_ends_what_is_drawn_beside_it():
    run, ended = Run(mode="sync"), []

    def draw(wave):
        if wave.number:
            try:
                while True:
                    check_wanted()
                    time.sleep(0.01)
            finally:
                ended.append(wave.number)
        return 10

    run.waves.draw = draw
    run.break_off[1, 0] = JudgeError("no verdict")
    with closing(Ahead(run)) as ahead:
        ahead.go_on(1, lineage([version(0)]))
        with pytest.raises(JudgeError, match="no verdict"):
            ahead.take(1)
    assert ended == [1]


def test_what_cannot_be_drawn_is_told_behind_the_waves_before_it():
    run = Run(mode="semi_online")

    def draw(wave):
        if wave.number:
            raise PoolError("no generator is left")
        return 10

    run.waves.draw = draw
    with closing(Ahead(run)) as ahead:
        ahead.go_on(1, lineage([version(0)]))
        parts = iter(ahead.take(1))
        assert len(next(parts)) == 2
        with pytest.raises(PoolError, match="no generator is left"):
            next(parts)


def test_sync_is_collected_by_the_weights_and_against_the_reference_that_it_starts_from():
    run, seen = Run(mode="sync"), []
    collect = run.waves.collect

    def collect_one(wave):
        seen.append((wave.iteration, [policy.number for policy in wave.policies], wave.reference.number))
        return collect(wave)

    run.waves.collect = collect_one
    with closing(Ahead(run)) as ahead:
        run.go(ahead, range(1, 7), [version(0)])
    assert run.sampled == [(number, number - 1, False) for number in range(1, 7)]
    assert seen == [(number, [number - 1], 99) for number in range(1, 7) for _ in range(2)]


def test_sync_begins_as_soon_as_weights_are_kept_and_is_made_anew_where_they_were_trained_again():
    """The learner may die before they are on disk."""
    run = Run(mode="sync")
    lost = PolicyVersion(number=1, digest="f" * 16)
    with closing(Ahead(run)) as ahead:
        run.go(ahead, [1], [version(0)])
        run.publisher.version, run.finished = lost, 1
        ahead.go_on(2, lineage([lost]))
        wait_until(lambda: len(run.sampled) == 2)
        run.publisher.version = version(1)
        ahead.go_on(2, lineage([version(1)]))
        found = ahead.take(2)
        list(found)
    assert found.harvest.sampled_by == {version(1).digest}


def test_semi_online_gives_a_wave_while_the_next_one_is_collected():
    """And collects no iteration before its turn."""
    run = Run(mode="semi_online", iterations=3)
    collect, begun, taken = run.waves.collect, [], threading.Event()

    def collect_one(wave):
        begun.append((wave.iteration, wave.number, run.finished))
        assert {policy.number for policy in wave.policies} == {wave.iteration - 1}
        if wave.number == 1:
            assert taken.wait(DEADLINE_S), "the first wave has come by now"
        return collect(wave)

    run.waves.collect = collect_one
    versions = [version(0)]
    with closing(Ahead(run)) as ahead:
        for number in (1, 2, 3):
            ahead.go_on(number, lineage(versions, version(99)))
            gathering = ahead.take(number)
            parts = iter(gathering)
            assert [pair.iteration for pair in next(parts)] == [1, 1]
            taken.set()
            assert len(list(parts)) == 1
            taken.clear()
            assert (len(gathering.harvest.pairs), gathering.cursor) == (4, 4 * number)
            assert gathering.metrics()["time/collect_wait_s"] > 0
            run.publisher.version = version(number)
            versions.append(version(number))
            run.finished = number
    assert begun == [(number, wave, number - 1) for number in (1, 2, 3) for wave in (0, 1)]


@pytest.mark.parametrize(
    ("error", "raised"), [(JudgeError("no verdict"), JudgeError), (WeightsLostError("gone"), PoolError)]
)
def test_an_error_of_a_wave_is_raised_where_its_pairs_are_asked_for(error, raised):
    """None of them is taken for the death of a learner."""
    run = Run(mode="semi_online")
    run.break_off[1, 1] = error
    with closing(Ahead(run)) as ahead:
        ahead.go_on(1, lineage([version(0)]))
        parts = iter(ahead.take(1))
        assert len(next(parts)) == 2
        with pytest.raises(raised, match=str(error)):
            next(parts)


def test_nothing_is_sampled_before_there_are_weights():
    """A run that is resumed while an iteration is trained on publishes when that is done."""
    run = Run()
    run.publisher.is_published = False
    with closing(Ahead(run)) as ahead:
        run.go(ahead, [1], versions := [version(0)])
        assert run.sampled == [(1, 0, True)]
        run.publisher.is_published = True
        run.go(ahead, [2, 3], versions)
    assert [by_main for _, _, by_main in run.sampled] == [True] + [False] * (len(run.sampled) - 1)


def test_what_weights_sampled_that_are_not_promoted_is_made_anew():
    """Such as those of an iteration whose checkpoint was damaged, and which was done again."""
    run = Run()
    given_up = PolicyVersion(number=0, digest="f" * 16)
    run.publisher.version = given_up
    run.waves.are_committed = lambda waves: False
    with closing(Ahead(run)) as ahead:
        ahead.go_on(1, lineage([version(0)]))
        wait_until(lambda: len(run.sampled) == 2)  # the first is done
        run.publisher.version = version(0)
        found = ahead.take(1)
        list(found)
    assert found.harvest.sampled_by == {version(0).digest}
    assert run.undone == [1]
    assert run.published == [0], "the learner may have gone on from the pairs"


def test_an_error_is_raised_where_the_pairs_are_asked_for():
    run = Run()
    run.break_off[2, 1] = JudgeError("no verdict")
    with closing(Ahead(run)) as ahead:
        run.go(ahead, [1], [version(0)])
        wait_until(lambda: not ahead._lives)
        ahead.go_on(2, lineage([version(0), version(1)]))
        with pytest.raises(JudgeError, match="no verdict"):
            ahead.take(2)
        with pytest.raises(JudgeError, match="no verdict"):
            ahead.check()
    assert [number for number, _, _ in run.sampled] == [1, 2], "nothing is collected behind it"


def test_too_few_prompts_are_said_where_they_are_asked_for():
    run = Run()
    take = run.prompts.take
    run.prompts.take = lambda n: take(n) if run.prompts.cursor < 8 else take(10**9 + n)
    run.prompts.task = SimpleNamespace(train=AdditionTask().train, num_train=0, name="few")
    run.prompts.render = lambda problem: Prompt(id=str(run.prompts.cursor + 1), text="", token_ids=(1,))
    with closing(Ahead(run)) as ahead, pytest.raises(DataError, match="few has"):
        run.go(ahead, [1, 2, 3], [version(0)])


def test_weights_that_are_lost_meanwhile_only_cost_the_head_start():
    run = Run()
    run.break_off[2, 0] = WeightsLostError("the learner died, and has gone on")
    with closing(Ahead(run)) as ahead:
        found = run.go(ahead, range(1, 5), [version(0)])
    assert [number for number, _, by_main in run.sampled if by_main] == [2]
    assert [each.cursor for each in found] == [4, 8, 12, 16]


def test_the_end_of_a_run_waits_for_nobody():
    run, started = Run(), threading.Event()

    def hang(wave):
        started.set()
        fetch(never, what="x", deadline_s=600, knob="x")

    never = object()
    run.waves.collect = hang
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("orchestrator.remote.ray.wait", lambda refs, **_: time.sleep(0.05) or ([], refs))
        ahead = Ahead(run)
        ahead.go_on(1, lineage([version(0)]))
        assert started.wait(DEADLINE_S)
        ahead.close()
    assert not ahead._lives


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(2, 5))
def test_one_thread_has_the_floor_at_a_time_in_the_order_in_which_they_asked(depths, num_threads):
    floor, within, seen = Floor(), [], []

    def work(name):
        for depth in depths:
            with floor.taken():
                within.append(name)
                for _ in range(depth):  # taken again by who has it
                    with floor.taken():
                        seen.append(set(within))
                seen.append(set(within))
                within.remove(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert all(len(names) == 1 for names in seen)
    assert len(seen) == num_threads * sum(depth + 1 for depth in depths)


def test_whoever_is_not_wanted_any_more_leaves_the_line():
    floor, unwanted, left = Floor(), threading.Event(), []

    def work():
        work_until(unwanted)
        try:
            with floor.taken():
                left.append("had it")
        except Unwanted:
            left.append("left")

    with floor.taken():
        thread = threading.Thread(target=work)
        thread.start()
        unwanted.set()
        thread.join(DEADLINE_S)
    assert left == ["left"]
    with floor.taken():
        pass


def test_a_stage_tells_its_seconds_and_its_rate():
    assert Stage(name="collect", seconds=4.0, tokens=100).metrics() == {
        "time/collect_s": 4.0,
        "throughput/collect_tokens_per_s": 25.0,
    }
    assert Stage(name="promote", seconds=4.0).metrics() == {"time/promote_s": 4.0}
