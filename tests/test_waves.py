"""A wave counts as a whole or is done again as a whole, wherever it was broken off."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from conf.compose import compose
from conf.schema import FilterConfig
from orchestrator.accounts import Accounts
from orchestrator.archive import Archive
from orchestrator.collecting import SampleCollector
from orchestrator.events import EventKind
from orchestrator.floor import Floor
from orchestrator.ledger import Ledger
from orchestrator.store import Store
from orchestrator.tally import Tally
from orchestrator.types import Prompt, RolloutGroup, Score, ScoredGroup
from orchestrator.waves import Harvest, Wave, Waves
from tests.records import V0, V1, completion

PROMPTS = [Prompt(id=f"task/{k}", text=f"{k}\n", token_ids=(1, 5 + k), answer="2") for k in range(4)]
CONFIG = compose(["generator.samples_per_prompt=3", "pairing.max_pairs=1"])


class Drawing:
    """Rollouts whose completions depend on prompt and policy alone; as they are drawn, a prompt is set aside."""

    def __init__(self, quarantined):
        self.drawn, self.quarantined = [], quarantined
        self.policy, self.switch = V1, None

    def sample(self, prompts, draws):
        self.quarantined["task/9"] = "it kills"
        self.drawn.append([prompt.id for prompt in prompts])
        (draw,) = draws
        return [[self._group(prompt, draw) for prompt in prompts]]

    def _group(self, prompt, draw):
        tokens = [(*prompt.token_ids, 10 * self.policy.number + k) for k in range(draw.num_samples)]
        return RolloutGroup(
            prompt=prompt,
            completions=tuple(self._completion(each) for each in tokens),
            iteration=draw.iteration,
            seed=prompt.token_ids[-1],
        )

    def _completion(self, tokens):
        made = completion(*tokens, policy=self.policy)
        return replace(made, switches=(self.switch,)) if self.switch else made


class Judging:
    """A judge by the last token; its figures are of what it was asked since it was last asked for them."""

    def __init__(self):
        self.asked, self.reported = [], 0

    def score(self, groups):
        self.asked.append([group.prompt.id for group in groups])
        return [ScoredGroup(group=group, scores=self._scores(group), scorer="last@1") for group in groups]

    def _scores(self, group):
        return tuple(Score(value=float(each.token_ids[-1] % 10)) for each in group.completions)

    def metrics(self):
        found = Tally()
        found.sum("judge/asked", len(self.asked) - self.reported)
        self.reported = len(self.asked)
        return found


class Process:
    """What one process has of a run folder."""

    def __init__(self, folder, ledger):
        self.accounts, self.store = Accounts(ledger), Store(folder)
        quarantined = dict(self.accounts.quarantined())
        self.rollouts, self.judge, self.events = Drawing(quarantined), Judging(), []
        self.archive = Archive(folder, self.accounts, self.events.append)
        collector = SampleCollector(
            CONFIG, self.rollouts, self.judge, self.store, self.archive, ledger, Floor(), quarantined
        )
        self.waves = Waves(
            collector=collector,
            judge=self.judge,
            filters=FilterConfig(),
            store=self.store,
            archive=self.archive,
            ledger=ledger,
            accounts=self.accounts,
            quarantined=quarantined,
        )


@contextmanager
def process(folder):
    with Ledger(folder) as ledger:
        yield Process(folder, ledger)


def waves_of(policy=V1):
    return [
        Wave(iteration=1, number=number, prompts=PROMPTS[start : start + 2], policies=[policy], reference=V0)
        for number, start in enumerate((0, 2))
    ]


def collect(process, policy=V1):
    return sum((process.waves.collect(wave) for wave in waves_of(policy)), Harvest())


def state(folder):
    """Files and rows, without the clock's."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in ("pairs", "rollouts", "samples")
        for path in sorted((folder / kind).iterdir())
    }
    columns = {
        "files": "path, iteration, bytes, digest",
        "waves": "iteration, wave, prompts, scored IS NULL, outcome",
        "groups": "*",
        "pairs": "*",
        "quarantine": "prompt, iteration, reason",
    }
    with Ledger(folder) as ledger:
        for table, names in columns.items():
            found[table] = [tuple(row) for row in ledger.db.execute(f"SELECT {names} FROM {table} ORDER BY 1, 2")]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with process(folder) as first:
        harvest = collect(first)
    return folder, harvest, state(folder)


def test_a_wave_by_hand(undisturbed):
    """Of 3 completions with the scores 0, 1, 2 the best and the worst make the pair of each prompt."""
    folder, harvest, left = undisturbed
    assert [pair.id for pair in harvest.pairs] == [f"1/task/{k}/2>0" for k in range(4)]
    assert harvest.tokens == 4 * 3 * 3
    assert (harvest.tally["rollout/completions"], harvest.tally["pairs/kept"], harvest.tally["judge/asked"]) == (
        12,
        4,
        2,
    )
    assert [row[:2] for row in left["groups"]] == [(1, f"task/{k}") for k in range(4)]
    assert list((folder / "samples").iterdir()) == []


def test_what_is_committed_is_read_back_and_never_made_again(undisturbed):
    folder, harvest, left = undisturbed
    with process(folder) as second:
        assert second.waves.are_committed(waves_of())
        again = collect(second)
        assert (second.rollouts.drawn, second.judge.asked, second.events) == ([], [], [])
        assert (again.sampled_by, again.evicted) == ({V1.digest}, 0)
    assert (again.pairs, dict(again.tally), again.tokens) == (harvest.pairs, dict(harvest.tally), 0)
    assert state(folder) == left


POINTS = [
    (Accounts, "issue_wave", 1),
    (Drawing, "sample", 1),
    (Store, "write_samples", 1),
    (Archive, "seal", 1),
    (Accounts, "wave_sampled", 1),
    (Judging, "score", 1),
    (Store, "write_rollouts", 1),
    (Store, "write_pairs", 1),
    (Archive, "seal", 2),
    (Accounts, "wave_scored", 1),
    (Accounts, "accept_pairs", 1),
    (Accounts, "quarantine", 1),
    (Archive, "drop", 1),
    (Accounts, "issue_wave", 2),
    (Accounts, "accept_pairs", 2),
]
"""Calls that a wave makes, in their order: which of them, and the how manieth."""


def break_off(monkeypatch, owner, name, visit, *, after):
    """The call is the last thing that the process does."""
    call, visits = getattr(owner, name), []

    def broken(*rest, **options):
        visits.append(None)
        if len(visits) < visit:
            return call(*rest, **options)
        if after:
            call(*rest, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[1]}-{point[2]}")
def test_broken_off_anywhere_it_ends_as_if_nothing_had_happened(tmp_path, undisturbed, point, after):
    break_off_and_do_again(tmp_path, undisturbed, point, collect, after=after)


def break_off_and_do_again(folder, undisturbed, point, collect, *, after):
    """Returns how many waves were sampled in both processes."""
    _, harvest, left = undisturbed
    with process(folder) as first, pytest.MonkeyPatch.context() as patched:
        break_off(patched, *point, after=after)
        with pytest.raises(KeyboardInterrupt):
            collect(first)
    with process(folder) as second:
        again = collect(second)
        assert (again.pairs, dict(again.tally)) == (harvest.pairs, dict(harvest.tally))
        assert second.events == []
    assert state(folder) == left
    return len(first.rollouts.drawn) + len(second.rollouts.drawn)


def collect_drawn(process, policy=V1):
    """Each wave is drawn before the one in front of it is judged."""
    first, second = waves_of(policy)
    tokens = process.waves.draw(first) + process.waves.draw(second)
    harvest = process.waves.collect(first) + process.waves.collect(second)
    return replace(harvest, tokens=harvest.tokens + tokens)


def test_waves_that_are_drawn_beforehand_are_the_same(tmp_path, undisturbed):
    _, harvest, left = undisturbed
    with process(tmp_path) as first:
        found = collect_drawn(first)
        assert (found.pairs, dict(found.tally), found.tokens) == (harvest.pairs, dict(harvest.tally), harvest.tokens)
        assert first.rollouts.drawn == [["task/0", "task/1"], ["task/2", "task/3"]]
        assert first.waves.draw(waves_of()[0]) == 0, "what is committed is not drawn again"
    assert state(tmp_path) == left


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "point",
    [
        (Accounts, "issue_wave", 2),
        (Drawing, "sample", 2),
        (Accounts, "wave_sampled", 2),
        (Judging, "score", 1),
        (Accounts, "wave_scored", 1),
        (Archive, "drop", 1),
        (Judging, "score", 2),
    ],
    ids=lambda point: f"{point[1]}-{point[2]}",
)
def test_drawn_beforehand_and_broken_off_it_ends_as_if_nothing_had_happened(tmp_path, undisturbed, point, after):
    drawn = break_off_and_do_again(tmp_path, undisturbed, point, collect_drawn, after=after)
    assert drawn <= 3, "what was drawn is not drawn again"


def stop_before_scoring(folder, policy=V1):
    """Leaves the samples of the first wave."""
    with process(folder) as first, pytest.MonkeyPatch.context() as patched:
        first.rollouts.policy = policy
        break_off(patched, Judging, "score", 1, after=False)
        with pytest.raises(KeyboardInterrupt):
            collect(first, policy)


def test_samples_that_are_left_are_not_drawn_again(tmp_path, undisturbed):
    stop_before_scoring(tmp_path)
    with process(tmp_path) as second:
        assert collect(second).tokens == 2 * 3 * 3
        assert second.rollouts.drawn == [["task/2", "task/3"]]
    assert state(tmp_path) == undisturbed[2]


def test_samples_of_other_weights_are_not_used(tmp_path, undisturbed):
    stop_before_scoring(tmp_path, policy=V0)
    with process(tmp_path) as second:
        collect(second)
        assert second.rollouts.drawn == [["task/0", "task/1"], ["task/2", "task/3"]]
    assert state(tmp_path) == undisturbed[2]


def test_damaged_samples_are_told_of_and_drawn_again(tmp_path, undisturbed):
    stop_before_scoring(tmp_path)
    (path,) = (tmp_path / "samples").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with process(tmp_path) as second:
        collect(second)
        assert len(second.rollouts.drawn) == 2
        assert [event.kind for event in second.events] == [EventKind.DAMAGED]
    assert state(tmp_path) == undisturbed[2]


@pytest.fixture
def finished(tmp_path):
    with process(tmp_path) as first:
        collect(first)
    return tmp_path


def test_waves_of_another_policy_are_done_again(finished):
    with process(finished) as second:
        second.rollouts.policy = V0
        assert not second.waves.are_committed(waves_of(V0))
        harvest = collect(second, V0)
        assert len(second.rollouts.drawn) == len(second.judge.asked) == 2
        assert harvest.evicted == 4
        assert collect(second, V0).evicted == 4, "read back with it"
        assert {pair.chosen.policy for pair in harvest.pairs} == {V0}
        assert second.waves.are_committed(waves_of(V0))
        assert not second.waves.are_committed(waves_of())


@pytest.mark.parametrize(("kind", "draws"), [("pairs", 0), ("rollouts", 1)])
def test_a_damaged_file_makes_its_wave_again_from_what_stands_before_it(finished, undisturbed, kind, draws):
    """Pairs from the rollouts, without another word of the judge, whose figures are lost; rollouts from the policy."""
    path = finished / kind / "iteration-0001-wave-0001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with process(finished) as second:
        assert not second.waves.are_committed(waves_of())
        again = collect(second)
        assert len(second.rollouts.drawn) == len(second.judge.asked) == draws
        (event,) = second.events
        assert (event.kind, str(path) in event.text) == (EventKind.DAMAGED, True)
        assert again.pairs == undisturbed[1].pairs
        assert again.tally["judge/asked"] == 1 + draws
    assert state(finished) | {"waves": None} == undisturbed[2] | {"waves": None}


def test_weights_that_took_over_within_a_completion_sampled_it_too(tmp_path):
    """A wave counts only where all weights that sampled a token of it may have."""
    with process(tmp_path) as first:
        first.rollouts.switch = (1, V0)
        collect(first)
        either, (wave, _) = [V0, V1], waves_of()
        assert not first.waves.are_committed([wave])
        assert first.waves.are_committed([replace(wave, policies=either)])
        assert first.waves.collect(replace(wave, policies=None)).sampled_by == {V0.digest, V1.digest}


def test_evicted_pairs_are_counted_whatever_dies_before_they_are_made_anew(finished):
    with process(finished) as second, pytest.MonkeyPatch.context() as patched:
        second.rollouts.policy = V0
        break_off(patched, Judging, "score", 2, after=False)
        with pytest.raises(KeyboardInterrupt):
            collect(second, V0)
    with process(finished) as third:
        third.rollouts.policy = V0
        assert collect(third, V0).evicted == 4
