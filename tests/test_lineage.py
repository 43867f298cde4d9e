"""Which policies a run has promoted: what its references are, and that it does not grow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import ReferenceConfig
from orchestrator.lineage import Lineage
from orchestrator.types import PolicyVersion

VERSIONS = [PolicyVersion(number=n, digest=f"{n:016x}") for n in range(5)]


def lineage(kind="initial", decay=0.9, *, bound=0, versions=VERSIONS):
    return Lineage(ReferenceConfig(kind=kind, ema_decay=decay), max_staleness=bound, versions=versions)


def test_references_are_the_first_the_latest_or_an_average_of_all():
    assert lineage("initial").reference == VERSIONS[0]
    assert lineage("previous").reference == VERSIONS[4]
    average = lineage("ema").reference
    assert average.number == 4
    assert average != lineage("ema", 0.8).reference
    assert average != lineage("ema", versions=VERSIONS[1:]).reference


@given(st.lists(st.integers(1, 4), max_size=12), st.integers(0, 3), st.sampled_from(["initial", "previous", "ema"]))
def test_it_is_the_same_whether_resumed_or_not_and_holds_what_the_bound_asks_for(steps, bound, kind):
    """A step of n: n - 1 iterations that promoted nothing, then one that did."""
    row = [VERSIONS[0]]
    for number, step in enumerate(steps, start=1):
        row += [row[-1]] * (step - 1) + [PolicyVersion(number=number, digest=f"{number:x}")]
    grown = lineage(kind, bound=bound, versions=row[:1])
    for version in row[1:]:
        before = (grown.latest, grown.reference)
        after = grown.after(version)
        assert (grown.latest, grown.reference) == before
        grown.add(version)
        assert (after.latest, after.reference) == (grown.latest, grown.reference)
    resumed = lineage(kind, bound=bound, versions=row)
    distinct = tuple(dict.fromkeys(row))
    assert grown.latest == resumed.latest == distinct[-(bound + 1) :]
    assert grown.reference == resumed.reference


def test_before_the_first_there_is_none():
    with pytest.raises(RuntimeError, match="no policy"):
        _ = lineage(versions=()).reference
