"""Each filter drops what it names, once, and nothing else."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from conf.schema import FilterConfig
from orchestrator.filters import filter_pairs
from orchestrator.types import FinishReason
from tests.records import any_pair, completion, pair

FINE = pair(completion(1, 2), completion(3))
CUT = pair(completion(1, 2, finish=FinishReason.LENGTH), completion(3))
REJECTED_CUT = pair(completion(1, 2), completion(3, finish=FinishReason.LENGTH))
SAME = pair(completion(1, 2), completion(1, 2))
SAME_AND_CUT = pair(completion(1, finish=FinishReason.LENGTH), completion(1))
OFF = FilterConfig(drop_truncated_chosen=False, drop_identical=False)


def test_defaults():
    kept, dropped = filter_pairs([FINE, CUT, SAME, REJECTED_CUT, SAME_AND_CUT], FilterConfig())
    assert kept == [FINE, REJECTED_CUT]
    assert dropped == Counter(identical=2, truncated_chosen=1)


def test_everything_off_keeps_everything():
    pairs = [FINE, CUT, SAME, REJECTED_CUT]
    assert filter_pairs(pairs, OFF) == (pairs, Counter())


def test_length_ratio_counts_either_side():
    config = FilterConfig(max_length_ratio=2.0)
    at_limit = pair(completion(1, 2, 3, 4), completion(5, 6))
    long_chosen = pair(completion(1, 2, 3, 4, 5), completion(6, 7))
    long_rejected = pair(completion(6, 7), completion(1, 2, 3, 4, 5))
    kept, dropped = filter_pairs([at_limit, long_chosen, long_rejected], config)
    assert kept == [at_limit]
    assert dropped == Counter(length_ratio=2)


@given(
    st.lists(any_pair, max_size=5),
    st.builds(
        FilterConfig,
        drop_truncated_chosen=st.booleans(),
        drop_identical=st.booleans(),
        max_length_ratio=st.none() | st.sampled_from([1.5, 3.0]),
    ),
)
def test_every_pair_is_kept_or_counted_and_order_stays(pairs, config):
    kept, dropped = filter_pairs(pairs, config)
    assert len(kept) + dropped.total() == len(pairs)
    remaining = iter(pairs)
    assert all(any(candidate is one for candidate in remaining) for one in kept)
