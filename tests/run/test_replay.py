"""Replay counts what a cache does, and Belady is the bound it is said to be."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routings import random_trace, trace_of

from moekit.errors import OptionError
from moekit.run._policies_known import Pinned, demand, hottest
from moekit.run.policy import CachePolicy, policies, policy
from moekit.run.predict import Predictor
from moekit.run.replay import bound, replay

tiny = st.lists(
    st.tuples(st.sets(st.integers(0, 3), min_size=1, max_size=2), st.sets(st.integers(0, 2), min_size=1, max_size=2)),
    min_size=1,
    max_size=5,
)


def fewest_misses(requests, capacity):
    """By trying everything: what is kept after each request is any subset of what was there, and what came."""
    sets = [frozenset((r.layer, e) for e in r.experts) for r in requests]

    @cache
    def best(at, held):
        if at == len(sets):
            return 0
        old = held - sets[at]
        room = min(capacity - len(sets[at]), len(old))
        after = {sets[at] | frozenset(c) for n in range(room + 1) for c in combinations(old, n)}
        return len(sets[at] - held) + min(best(at + 1, kept) for kept in after)

    return best(0, frozenset())


@settings(max_examples=60)
@given(tiny, st.integers(2, 5))
def test_belady_is_the_brute_force_optimum(steps, capacity):
    trace = trace_of(steps)
    assert bound(trace, capacity).misses == fewest_misses(trace.requests, capacity)


@pytest.mark.parametrize("spec", [*policies(), "lru:pool=global", "multi-term:pool=layer", "arc:pool=global"])
@pytest.mark.parametrize("capacity", [2, 7, 12])
def test_no_policy_beats_the_bound(spec, capacity):
    for seed in range(4):
        trace = random_trace(seed)
        found = replay(trace, policy(spec), capacity)
        assert found.lookups == 60 * 3 * 2
        assert found.misses >= bound(trace, capacity).misses


def test_counters_add_up_by_layer_and_phase():
    trace = random_trace(5)
    found = replay(trace, policy("lru"), 8, expert_bytes=[10, 100, 1000])
    assert found.layer_lookups.tolist() == [120] * 3
    assert found.layer_hits.sum() == found.hits
    assert found.demand_bytes == int((found.layer_lookups - found.layer_hits) @ np.array([10, 100, 1000]))
    assert found.hit_rate == found.hits / found.lookups
    assert found.tokens == 60


class Fixed(Predictor):
    """Always the same ranking, for every later layer."""

    def __init__(self, layers, experts):
        self.layers, self.experts = layers, experts

    def predict(self, layer, signal, horizon):
        return [[(e, 1.0) for e in self.experts] for _ in range(layer + 1, min(layer + horizon + 1, self.layers))]


def test_prefetches_are_counted_whether_they_help_or_not():
    trace = trace_of([[{0}, {1}], [{2}, {3}]])
    found = replay(trace, policy("lru:pool=global"), 2, Fixed(2, [1]), width=1)
    # (0, 1) is read for nothing before each step; (1, 1) serves the first step and is read in vain in the second
    assert found.prefetch_hits == found.hits == 1
    assert (found.prefetches, found.prefetch_bytes, found.useless_prefetch_bytes) == (4, 4, 3)
    assert found.demand_bytes == found.misses == 3


def test_width_limits_what_is_read_and_depth_what_is_considered():
    trace = trace_of([[{0}, {0}]])
    assert replay(trace, policy("lru"), 6, Fixed(2, [0, 1, 2]), width=2, depth=3).prefetches == 4
    assert replay(trace, policy("lru"), 6, Fixed(2, [0, 1, 2]), width=3, depth=1).prefetches == 2
    assert replay(trace, policy("lru"), 6, Fixed(2, [0, 1, 2]), width=0).prefetches == 0


def test_only_the_phase_asked_for_is_counted():
    trace = trace_of([[{0}], [{0}], [{1}]], decode=False)
    trace.decode[1:] = True
    found = replay(trace, policy("lru"), 2, phase="decode")
    assert (found.lookups, found.hits, found.tokens) == (2, 1, 2)


def test_pinned_experts_stay_unless_nothing_else_may_go():
    trace = trace_of([[{e}] for e in (0, 1, 2, 3, 0, 4, 5, 0)])
    assert replay(trace, policy("lru"), 2).hits == 0
    assert replay(trace, Pinned(policy("lru"), [(0, 0)]), 2).hits == 2
    assert replay(trace, Pinned(policy("lru"), [(0, e) for e in range(6)]), 2).misses == 8


def test_hottest_and_demand():
    trace = trace_of([[{0, 1}, {2}], [{1}, {2}], [{1}, {3}]])
    assert hottest(trace, 3) == [(0, 1), (1, 2), (0, 0)]
    assert demand(trace)[0, :2].tolist() == pytest.approx([1 / 3, 1.0])


def test_a_cache_below_the_largest_request_is_refused():
    with pytest.raises(OptionError, match=r"a cache of 1 experts.*room for the 2 experts of the largest request"):
        replay(trace_of([[{0, 1}]]), policy("lru"), 1)


class Bypass(CachePolicy):
    """Keeps whatever came first."""

    def victim(self, resident, pinned, incoming):
        return None


def test_what_is_not_kept_is_counted():
    found = replay(trace_of([[{e}] for e in (0, 1, 2, 0, 2)]), Bypass(), 2)
    assert (found.hits, found.misses, found.bypassed) == (1, 4, 2)
