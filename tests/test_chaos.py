"""A part of the chaos matrix: `make chaos` plays all of it, each cell in a run of its own."""

import pytest

from tests.chaos.cells import Cell, play, reference_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def expected(folder):
    return reference_run(folder, "transformers")


def cells_of(deaths):
    return [Cell(role=death.split(" while ")[0], point=death.split(" while ")[1]) for death in deaths.split(", ")]


@pytest.mark.parametrize(
    "deaths",
    [
        "generator while collecting, judge while scoring, learner while optimizer step, generator while evaluating",
        "queue while packing, controller while checkpoint, learner while publication",
    ],
)
def test_whoever_dies_the_run_ends_with_the_same_pairs_and_weights(folder, expected, deaths):
    cells = cells_of(deaths)
    name = f"{cells[0].role}-first"
    outcome = play(*cells, folder=folder, name=name, visit=2, engine="transformers", expected=expected)
    assert outcome.findings == []


@pytest.mark.parametrize(
    "deaths",
    [
        "generator while collecting, judge while scoring, learner while optimizer step",
        "queue while packing, controller while checkpoint",
    ],
)
def test_whoever_dies_nothing_is_lost_repeated_or_stale_while_pairs_are_collected_ahead(folder, deaths):
    cells = cells_of(deaths)
    name = f"ahead-{cells[0].role}-first"
    outcome = play(*cells, folder=folder, name=name, visit=2, engine="transformers", expected=None)
    assert outcome.findings == []
