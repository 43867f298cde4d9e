"""Which pairs are trained on together depends on the parts in which they come, and on nothing else."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.compose import compose
from orchestrator.batch_plan import BatchPlan
from orchestrator.batching import batches
from orchestrator.seeds import derive_seed
from tests.records import completion, pair

SIZE = 4


def made(number):
    """Three pairs a prompt."""
    whole = pair(completion(number), completion(number + 1))
    return replace(whole, id=str(number), prompt=replace(whole.prompt, id=str(number // 3), token_ids=(1, number // 3)))


@cache
def config_of(epochs, loss):
    return compose([f"learner.batch_pairs={SIZE}", f"learner.epochs={epochs}", f"loss={loss}", "seed=5"])


def plan_of(parts, epochs=1, loss="dpo"):
    noted = []
    plan = BatchPlan(
        config_of(epochs, loss), 2, iter(parts), lambda iteration, found: noted.append((iteration, [*map(list, found)]))
    )
    return plan, noted


parts_of_pairs = st.lists(st.integers(0, 9), max_size=5).map(
    lambda sizes: [
        [made(number) for number in range(sum(sizes[:index]), sum(sizes[: index + 1]))] for index in range(len(sizes))
    ]
)


@given(parts_of_pairs, st.integers(1, 3), st.sampled_from(["dpo", "nca"]))
def test_every_pair_is_in_one_batch_of_each_epoch_and_none_waits_for_long(parts, epochs, loss):
    plan, noted = plan_of(parts, epochs, loss)
    seen = []
    while plan.more():
        assert plan.batches[: len(seen)] == seen, "what is planned stays"
        assert len(plan.batches) > len(seen)
        seen = list(plan.batches)
    assert plan.is_complete
    assert not plan.more()
    assert noted[-1] == (2, plan.batches)
    ids = Counter(one.id for batch in plan.batches for one in batch)
    assert ids == {one.id: epochs for part in parts for one in part}
    if loss == "dpo":
        num_pairs = sum(map(len, parts))
        sizes = [len(batch) for batch in plan.batches]
        assert sorted(sizes, reverse=True)[: epochs * (num_pairs // SIZE)] == [SIZE] * (epochs * (num_pairs // SIZE))
    again, _ = plan_of(parts, epochs, loss)
    again.complete()
    assert again.batches == plan.batches


@pytest.mark.parametrize("epochs", [1, 2])
def test_one_part_is_shuffled_as_a_whole(epochs):
    pairs = [made(number) for number in range(11)]
    plan, _ = plan_of([pairs], epochs)
    plan.complete()
    seed = derive_seed(5, "shuffle", 2)
    assert plan.batches == [
        batch for epoch in range(epochs) for batch in batches(pairs, batch_pairs=SIZE, seed=seed, epoch=epoch)
    ]


def test_a_part_is_asked_for_when_the_batches_before_it_are_taken():
    asked = []

    def parts():
        for index in range(3):
            asked.append(index)
            yield [made(10 * index + number) for number in range(6)]

    plan, _ = plan_of(parts())
    assert asked == []
    assert plan.more()
    assert (asked, len(plan.batches)) == ([0], 1), "the rest waits for the next part"
    assert plan.more()
    assert (asked, len(plan.batches)) == ([0, 1], 2)


@given(parts_of_pairs, st.data())
def test_a_batch_is_reached_from_wherever_a_run_goes_on(parts, data):
    """Batches that were acknowledged by an earlier process may be behind those of the parts that have come."""
    plan, _ = plan_of(parts)
    plan.complete()
    number = data.draw(st.integers(0, len(plan.batches)))
    resumed, _ = plan_of(parts)
    assert resumed.reaches(number) == (number < len(plan.batches))
    assert resumed.batches == plan.batches[: len(resumed.batches)]
    assert resumed.is_complete or len(resumed.batches) > number
