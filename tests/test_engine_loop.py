"""Many callers share one engine; an engine that dies fails all of them, and none waits forever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine_loop import EngineLoop, _that_sampled
from orchestrator.errors import ActorLostError, PublicationError
from orchestrator.types import FinishReason, GenerationRequest, PolicyVersion, SamplingParams
from tests.fakes import CountingEngine

VERSION, NEXT, LAST = (PolicyVersion(number=number, digest=f"{number:016x}") for number in (1, 2, 3))


def request(name, max_tokens=3, prompt=(1,)):
    return GenerationRequest(id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens), seed=0)


@pytest.fixture
def loop():
    loop = EngineLoop(CountingEngine())
    loop.hold(VERSION)
    yield loop
    loop.stop()


def engine_of(loop):
    return loop._engine


def test_answers_come_in_the_order_of_the_requests(loop):
    lengths = [5, 1, 3, 2, 4]
    completions = loop.submit([request(f"r{i}", n) for i, n in enumerate(lengths)]).result(5)
    assert [len(completion.token_ids) for completion in completions] == lengths
    assert {completion.policy for completion in completions} == {VERSION}
    assert loop.generated_tokens == sum(lengths)


def test_a_wave_joins_the_batch_together(loop):
    loop.submit([request("a", 2), request("b", 2)]).result(5)
    assert engine_of(loop).batches == [["a", "b"], ["a", "b"]]


def test_callers_share_batches(loop):
    hold = loop.call(lambda engine: [loop.submit([request(f"c{i}", 50)]) for i in range(3)])
    for future in hold.result(5):
        assert len(future.result(5)[0].token_ids) == 50
    assert ["c0", "c1", "c2"] in engine_of(loop).batches


def test_calls_run_between_steps_while_requests_run(loop):
    wave, count = loop.call(
        lambda engine: (loop.submit([request("long", 200)]), loop.call(lambda engine: len(engine.batches)))
    ).result(5)
    assert count.result(5) < 200
    assert len(wave.result(5)[0].token_ids) == 200


def test_a_refused_request_fails_its_wave_only(loop):
    good = loop.submit([request("good", 100)])
    bad = loop.submit([request("x"), request("empty", prompt=())])
    with pytest.raises(ValueError, match="empty prompt"):
        bad.result(5)
    assert len(good.result(5)[0].token_ids) == 100
    assert len(loop.submit([request("x")]).result(5)) == 1, "the wave's other request was taken back"


def test_the_same_id_twice_is_refused(loop):
    with pytest.raises(ValueError, match="already in flight"):
        loop.submit([request("twice"), request("twice")]).result(5)


def test_an_error_in_a_call_reaches_its_caller_only(loop):
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda engine: 1 / 0).result(5)
    assert loop.submit([]).result(5) == []


def test_a_dying_engine_fails_everybody(loop):
    engine_of(loop).fail_at_step = 0
    waves = [loop.submit([request(f"w{i}")]) for i in range(2)]
    for wave in waves:
        with pytest.raises(ActorLostError, match="its engine died: RuntimeError: out of memory"):
            wave.result(5)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.submit([request("later")]).result(5)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.call(lambda engine: 1).result(5)


def test_its_owner_is_told_when_the_engine_dies():
    engine, told = CountingEngine(), []
    engine.fail_at_step = 0
    loop = EngineLoop(engine, on_failure=told.append)
    loop.hold(VERSION)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.submit([request("a")]).result(5)
    loop.stop()
    assert [str(error) for error in told] == ["out of memory"]


def test_aborted_requests_come_back_empty_and_the_others_go_on(loop):
    wave, _ = loop.call(
        lambda engine: (loop.submit([request("a", 10**9), request("b", 5)]), loop.abort(["a", "unknown"]))
    ).result(5)
    given_up, done = wave.result(5)
    assert (given_up.finish_reason, given_up.token_ids) == (FinishReason.ABORTED, ())
    assert len(done.token_ids) == 5


def test_nothing_is_answered_before_weights_are_published():
    loop = EngineLoop(CountingEngine())
    with pytest.raises(PublicationError, match="no published weights"):
        loop.submit([request("early", 1)]).result(5)


def test_weights_that_fail_in_flight_fail_what_runs(loop):
    def break_weights(engine):
        loop.hold(None)

    wave, _ = loop.call(lambda engine: (loop.submit([request("a", 5)]), loop.call(break_weights))).result(5)
    with pytest.raises(PublicationError, match="no published weights"):
        wave.result(5)


def test_a_completion_says_which_weights_sampled_which_of_its_tokens(loop):
    def switch(engine):
        loop.hold(None)
        loop.hold(NEXT)
        return len(engine.running["long"][1])

    wave, before = loop.call(lambda engine: (loop.submit([request("long", 200)]), loop.call(switch))).result(5)
    sampled, completion = before.result(5), wave.result(5)[0]
    assert (completion.policy, completion.switches) == ((VERSION, ((sampled, NEXT),)) if sampled else (NEXT, ()))
    assert loop.submit([request("later")]).result(5)[0].policy == NEXT
    assert loop.call(lambda engine: loop._held).result(5) == {}


@given(st.lists(st.integers(0, 6), max_size=4).map(sorted), st.integers(0, 6))
def test_weights_under_which_nothing_was_sampled_are_not_named(starts, length):
    versions = [PolicyVersion(number=number, digest="0" * 16) for number in range(len(starts) + 1)]
    held = list(zip([0, *starts], versions, strict=True))
    expected = [max(version.number for start, version in held if start <= token) for token in range(length)]
    found = _that_sampled(held, length)
    assert [max(version.number for start, version in found if start <= token) for token in range(length)] == expected
    assert len(found) == max(1, len(set(expected)))
    assert found[0][0] == 0


def test_stop_closes_the_engine_and_fails_what_runs():
    loop = EngineLoop(CountingEngine())
    loop.hold(VERSION)
    wave = loop.submit([request("endless", 10**9)])
    loop.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        wave.result(5)
    assert engine_of(loop).closed


def test_nothing_is_sampled_during_a_pause():
    """Weights that come tensor by tensor are on their way: what runs waits, and so does what comes meanwhile."""
    loop = EngineLoop(CountingEngine())
    loop.hold(VERSION)

    def pause(engine):
        loop.pause()
        return len(engine.batches)

    running, before = loop.call(lambda engine: (loop.submit([request("long", 50)]), loop.call(pause))).result(5)
    steps = before.result(5)
    late = loop.submit([request("late", 3)])
    assert loop.call(lambda engine: len(engine.batches)).result(5) == steps
    assert not running.done()
    loop.call(lambda _: loop.hold(NEXT)).result(5)
    assert late.result(5)[0].policy == NEXT
    (completion,) = running.result(5)
    assert (completion.policy, completion.switches) == ((VERSION, ((steps, NEXT),)) if steps else (NEXT, ()))


def test_what_came_during_a_pause_is_refused_where_no_weights_are_proved():
    loop = EngineLoop(CountingEngine())
    loop.hold(VERSION)
    loop.call(lambda _: loop.pause()).result(5)
    late = loop.submit([request("late", 3)])
    loop.call(lambda _: loop.hold(None)).result(5)
    with pytest.raises(PublicationError, match="no published weights"):
        late.result(5)


class Pumping(CountingEngine):
    """Sequences are scored by steps of the engine, which take what is in flight along, as those of vLLM do."""

    def __init__(self):
        super().__init__()
        self.late = []

    def score(self, sequences):
        self.late += super().step()
        return []

    def step(self):
        late, self.late = self.late, []
        return late + (super().step() if self.running else [])

    def has_unfinished(self):
        return bool(self.running or self.late)


@pytest.mark.parametrize("length", [3, 4, 50])
def test_what_is_sampled_while_weights_are_proved_is_of_these_weights_and_nothing_else_is(length):
    """Also of a completion that ends on the way."""
    loop = EngineLoop(Pumping())
    loop.hold(VERSION)

    def start(engine):
        return loop.submit([request("a", length)]), loop.call(run)

    def run(engine):
        for _ in range(2):  # tokens of the old weights
            assert engine.step() == []
        return loop.call(switch)

    def switch(engine):
        loop.pause()
        engine.score([])
        loop.hold(NEXT)

    (completion,) = loop.call(start).result(5)[0].result(5)
    assert (completion.policy, completion.switches) == (VERSION, ((2, NEXT),))
