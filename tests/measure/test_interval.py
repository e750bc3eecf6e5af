"""Intervals: hand-worked figures, determinism, and what they refuse."""

import numpy as np
import pytest

from moekit.measure import Interval


def test_over_seeds_is_students_t():
    interval = Interval.over_seeds([1.0, 2.0, 3.0])
    half = 4.302652729911275 * 1.0 / np.sqrt(3)  # t quantile at 97.5 %, two degrees of freedom
    assert interval.mean == 2.0
    assert interval.high == pytest.approx(2.0 + half)
    assert interval.low == pytest.approx(2.0 - half)


def test_one_seed_claims_no_spread_it_has_not_seen():
    assert Interval.over_seeds([4.0]) == Interval(4.0, 4.0, 4.0, 1)


def test_bootstrap_of_a_ratio():
    interval = Interval.bootstrap([1.0, 3.0], weights=[1.0, 1.0])
    assert (interval.mean, interval.low, interval.high) == (2.0, 1.0, 3.0)
    weighted = Interval.bootstrap([2.0, 2.0], weights=[1.0, 3.0])
    assert weighted.mean == 1.0


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        interval = Interval.bootstrap(rng.normal(5.0, 1.0, 60), draws=400)
        hits += interval.low <= 5.0 <= interval.high
    assert 175 <= hits <= 200


def test_bootstrap_is_deterministic_under_a_seed():
    values = list(np.random.default_rng(1).random(20))
    assert Interval.bootstrap(values) == Interval.bootstrap(values)
    assert Interval.bootstrap(values) != Interval.bootstrap(values, seed=1)


def test_nothing_has_no_interval():
    for make in (Interval.over_seeds, Interval.bootstrap):
        with pytest.raises(ValueError, match="at least one value"):
            make([])
    with pytest.raises(ValueError, match="positive sum"):
        Interval.bootstrap([1.0], weights=[0.0])
