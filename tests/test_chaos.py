"""A part of the chaos matrix: `make chaos` plays all of it, each cell in a run of its own."""

import pytest

from tests.chaos.cells import MODES, Cell, play, reference_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


def cells_of(deaths):
    return [Cell(role=death.split(" while ")[0], point=death.split(" while ")[1]) for death in deaths.split(", ")]


FIRST = "generator while collecting, judge while scoring, learner while optimizer step"
THEN = "queue while packing, controller while checkpoint"
RUNS = [
    ("sync", f"{FIRST}, generator while evaluating"),
    ("sync", f"{THEN}, learner while publication"),
    ("semi_online", "judge while scoring, learner while optimizer step, controller while checkpoint"),
    ("async", FIRST),
    ("async", THEN),
]


@pytest.fixture(scope="module")
def expected(folder):
    """By mode."""
    return {mode: reference_run(folder, "transformers", mode) for mode in MODES}


@pytest.mark.parametrize(("mode", "deaths"), RUNS, ids=lambda part: part.partition(" ")[0])
def test_whoever_dies_nothing_is_lost_or_repeated_and_what_can_be_the_same_is(folder, expected, mode, deaths):
    cells = cells_of(deaths)
    name = f"{mode}-{cells[0].role}-first"
    outcome = play(*cells, folder=folder, name=name, visit=2, engine="transformers", mode=mode, expected=expected[mode])
    assert outcome.findings == []
