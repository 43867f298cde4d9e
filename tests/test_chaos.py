"""A part of the chaos matrix: `make chaos` plays all of it, each cell in a run of its own."""

import pytest

from tests.chaos.cells import Cell, play, reference_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


def cells_of(deaths):
    return [Cell(role=death.split(" while ")[0], point=death.split(" while ")[1]) for death in deaths.split(", ")]


DEATHS = (
    "generator while collecting, judge while scoring, learner while optimizer step, queue while packing,"
    " controller while checkpoint"
)
RUNS = {
    "sync": f"{DEATHS}, learner while publication, generator while evaluating",
    "semi_online": "judge while scoring, learner while optimizer step, controller while checkpoint",
    "async": DEATHS,
}


@pytest.mark.parametrize("mode", RUNS)
def test_whoever_dies_nothing_is_lost_or_repeated_and_what_can_be_the_same_is(folder, mode):
    expected = reference_run(folder, "transformers", mode)
    cells = cells_of(RUNS[mode])
    outcome = play(*cells, folder=folder, name=mode, visit=2, engine="transformers", mode=mode, expected=expected)
    assert outcome.findings == []
