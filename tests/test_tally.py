"""Figures joined from parts are those of the whole."""

import json
import math
from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.tally import Tally

values = st.lists(st.integers(-(10**6), 10**6))


def tally_of(listed):
    tally = Tally()
    tally.mean("length_mean", listed)
    tally.ratio("negative_fraction", sum(value < 0 for value in listed), len(listed))
    tally.sum("count", len(listed))
    if listed:
        tally.max("length_max", max(listed))
    return tally


@given(st.lists(values, max_size=5))
def test_joining_parts_is_counting_at_once(parts):
    joined = reduce(add, map(tally_of, parts), Tally())
    whole = [value for part in parts for value in part]
    expected = {"count": len(whole)} if parts else {}
    if whole:
        expected |= {
            "length_mean": sum(whole) / len(whole),
            "negative_fraction": sum(value < 0 for value in whole) / len(whole),
            "length_max": max(whole),
        }
    assert dict(joined) == expected


@given(values, values)
def test_what_was_dumped_goes_on_as_if_it_had_stayed(first, second):
    kept = Tally.load(json.loads(json.dumps(tally_of(first).dump())))
    assert dict(kept) == dict(tally_of(first))
    assert dict(kept + tally_of(second)) == dict(tally_of(first + second) if second else tally_of(first) + tally_of([]))


def test_parts_are_left_as_they_were():
    one, two = tally_of([1, 5]), tally_of([9])
    assert (one + two)["length_mean"] == 5
    assert (one["length_mean"], two["length_max"]) == (3, 9)


def test_renamed_figures_join_under_their_new_names():
    named = tally_of([2, 4]).renamed("length", "tokens") + tally_of([9]).renamed("length", "tokens")
    assert (named["tokens_mean"], named["tokens_max"]) == (5, 9)
    assert "length_mean" not in named
    twice = Tally()
    twice.sum("judge/judge/x", 1)
    assert dict(twice.renamed("judge/", "anchor/")) == {"anchor/judge/x": 1}


def test_nothing_is_no_figure_and_nan_stays():
    empty = Tally()
    empty.mean("mean", [])
    empty.ratio("ratio", 0, 0)
    assert dict(empty) == {}
    odd = Tally()
    odd.mean("loss", [1.0, math.nan])
    assert math.isnan(Tally.load(json.loads(json.dumps(odd.dump())))["loss"])
    with pytest.raises(KeyError):
        empty["mean"]
