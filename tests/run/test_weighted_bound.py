"""The weighted optimum equals Belady where costs are equal, and brute force where they are not."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routings import random_trace, trace_of

from moekit.errors import OptionError
from moekit.run._weighted_bound import least_penalty
from moekit.run.policy import policy
from moekit.run.replay import bound, replay


@pytest.mark.parametrize("capacity", [2, 5, 9, 16])
def test_equal_costs_give_beladys_misses(capacity):
    trace = random_trace(0)
    assert least_penalty(trace.requests, lambda at, key: 1.0, capacity) == pytest.approx(bound(trace, capacity).misses)


tiny = st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=2), min_size=1, max_size=7)


@settings(max_examples=60)
@given(tiny, st.integers(2, 3), st.integers(0, 99))
def test_unequal_costs_give_the_brute_force_optimum(steps, capacity, seed):
    requests = trace_of([[chosen] for chosen in steps]).requests
    price = np.random.default_rng(seed).integers(0, 5, (len(steps), 5)).astype(float)

    @cache
    def best(at, held):
        if at == len(requests):
            return 0.0
        own = frozenset(requests[at].experts)
        old = held - own
        after = [
            own | frozenset(c) for n in range(min(capacity - len(own), len(old)) + 1) for c in combinations(old, n)
        ]
        return sum(price[at, e] for e in own - held) + min(best(at + 1, kept) for kept in after)

    found = least_penalty(requests, lambda at, key: price[at, key[1]], capacity)
    assert found == pytest.approx(best(0, frozenset()))


def test_replay_tells_what_was_missed():
    trace, seen = random_trace(1), []
    found = replay(trace, policy("lru"), 6, missed=lambda request, keys: seen.extend(keys))
    assert len(seen) == found.misses
    assert all(isinstance(layer, int) for layer, _ in seen)


def test_a_cache_below_the_largest_request_has_no_optimum():
    with pytest.raises(OptionError, match="a cache of 1 experts is smaller"):
        least_penalty(trace_of([[{0, 1}]]).requests, lambda at, key: 1.0, 1)
