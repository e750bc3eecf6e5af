"""SRP and SCH against brute force and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routings import random_trace, trace_of
from scipy.stats import binom

from moekit.errors import OptionError
from moekit.run._policies_pools import LayerPools
from moekit.run.local_routing_consistency import SegmentCache, srp, window_counts
from moekit.run.replay import bound, replay


def test_constant_routing_is_perfectly_consistent():
    found = srp(window_counts(trace_of([[{0, 3}]] * 20), 8), 8)
    assert (found.srp, found.size) == (1.0, 1.0)


def test_uniform_routing_has_the_analytic_value():
    draw = np.random.default_rng(0)
    trace = trace_of([[draw.choice(16, 2, replace=False)] for _ in range(6000)], 16)
    c = np.arange(17)
    share = binom.pmf(c, 16, 2 / 16)
    scores = [2 * (c * share)[a:].sum() / (16 * share[a:].sum() + 2.0) for a in range(1, 17)]
    found = srp(window_counts(trace, 16), 16)
    assert max(scores) == pytest.approx(0.321, abs=1e-3)
    assert found.srp == pytest.approx(max(scores), abs=0.01)
    assert found.size == pytest.approx(2.6, abs=0.1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40).filter(any))
def test_srp_is_the_best_threshold_by_brute_force(counts):
    count = np.array(counts)
    scores = []
    for a in range(1, 6):
        true = count[count >= a].sum()
        scores.append(2 * true / (5 * (count >= a).sum() + count.sum()))
    assert srp(count, 5).srp == pytest.approx(max(scores))


def test_windows_slide_and_do_not_cross_sequences():
    trace = trace_of([[{0}], [{1}], [{0}], [{2}]], 3, sequence=[0, 0, 0, 1])
    assert window_counts(trace, 2)[:, 0].tolist() == [[1, 1, 0], [1, 1, 0]]
    with pytest.raises(OptionError, match="no sequence of the trace has 5 tokens"):
        window_counts(trace, 5)
    with pytest.raises(OptionError, match="nothing to predict"):
        srp(np.zeros((2, 1, 3), int), 2)


def naive_hits(steps, capacity, window):
    """SCH of one layer, written down directly."""
    cache, last, hits = set(), {}, 0
    for t, chosen in enumerate(steps):
        hits += len(cache & set(chosen))
        for e in chosen:
            last[e] = t
        for e in [e for e in sorted(chosen) if e not in cache]:
            if len(cache) == capacity:
                coming = {c: sum(c in s for s in steps[t + 1 : t + 1 + window]) for c in cache - set(chosen)}
                cache.remove(min(coming, key=lambda c: (coming[c], last[c], c)))
            cache.add(e)
    return hits


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 12))
def test_segment_cache_agrees_with_a_naive_simulation_and_the_bound(seed, capacity, window):
    trace = random_trace(seed, steps=40, layers=1)
    steps = [tuple(row) for row in trace.expert[:, 0].tolist()]
    found = replay(trace, SegmentCache(trace=trace, window=window), capacity)
    assert found.hits == naive_hits(steps, capacity, window) <= bound(trace, capacity).hits


def test_pools_hold_it_to_each_layers_share():
    trace = random_trace(7)
    cache = LayerPools(SegmentCache(trace=trace, window=8))
    assert 0 < replay(trace, cache, 9).hits <= bound(trace, 9).hits
