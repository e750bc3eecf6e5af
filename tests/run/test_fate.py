"""Fate: quotas, the width of a prefetch, and the prefill order."""

import pytest
from routings import random_trace

from moekit.errors import OptionError
from moekit.run.fate import Fate, boundary, prefill_order, proportional, width
from moekit.run.replay import replay
from moekit.run.schedule import flow_shop, johnson


def test_shallow_layers_are_whole_and_the_rest_is_equal():
    quota = Fate(boundary=1).quotas((8, 8, 8), 14)
    assert quota == {0: 8.0, 1: 3.0, 2: 3.0}
    trace = random_trace(2, steps=80)
    assert replay(trace, Fate(boundary=1).policy((8, 8, 8), 14), 14).layer_hits[0] >= 2 * 80 - 8
    with pytest.raises(OptionError, match="2 whole layers are 16 experts, more than the cache of 14"):
        Fate(boundary=2).quotas((8, 8, 8), 14)


def test_boundary_is_where_prediction_reaches_the_mean_and_others_keep_room():
    assert boundary([0.1, 0.5, 0.8, 0.9, 0.9], (8,) * 5, 40, 2) == 2
    assert boundary([0.1, 0.5, 0.8, 0.9, 0.9], (8,) * 5, 18, 2) == 1
    assert boundary([0.9, 0.1], (8, 8), 16, 2) == 0


def test_proportional_shares_follow_what_is_missed_up_to_whole_layers():
    assert proportional([0.5, 0.75], (8, 8), 6) == pytest.approx({0: 4.0, 1: 2.0})
    assert proportional([0.0, 0.9, 0.9], (8, 8, 8), 12) == pytest.approx({0: 8.0, 1: 2.0, 2: 2.0})


def test_width_is_what_the_window_carries():
    assert width(1.0, 0.3) == 3
    with pytest.raises(OptionError, match="expected a time above 0"):
        width(1.0, 0.0)


def test_popular_first_is_optimal_for_equal_transfers_and_not_for_others():
    tokens = [3, 9, 1, 5]
    order = prefill_order(tokens)
    assert flow_shop(order, [4.0] * 4, tokens) == flow_shop(johnson([4.0] * 4, tokens), [4.0] * 4, tokens)
    unequal = [1.0, 9.0, 1.0, 5.0]
    assert flow_shop(order, unequal, tokens) > flow_shop(johnson(unequal, tokens), unequal, tokens)
