"""A part of the chaos matrix: `make chaos` plays all of it."""

import pytest

from tests.chaos.cells import Cell, play, reference_run

CELLS = [
    Cell(point="collecting", role="generator"),
    Cell(point="scoring", role="judge"),
    Cell(point="optimizer step", role="learner"),
    Cell(point="packing", role="queue"),
    Cell(point="checkpoint", role="controller"),
    Cell(point="publication", role="learner"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def expected(folder):
    return reference_run(folder, "transformers")


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_whoever_dies_the_run_ends_with_the_same_pairs_and_weights(folder, expected, cell):
    name = str(cell).replace(" ", "-")
    outcome = play(cell, folder, name=name, visit=2, engine="transformers", expected=expected)
    assert outcome.findings == []
