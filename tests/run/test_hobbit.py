"""HOBBIT: what a missing expert is read at, and weights tuned to a penalty."""

import numpy as np
import pytest
from routings import random_trace

from moekit.errors import OptionError
from moekit.run.hobbit import HIGH, LOW, SKIP, Hobbit, share_before
from moekit.run.replay import bound, replay


def test_precision_follows_the_weight_before_an_expert_excluding_its_own():
    weight = np.array([[0.3, 1.2, 0.1, 0.4], [0.5, 0.5, 0.0, 0.0]])
    assert share_before(weight)[0].tolist() == pytest.approx([0.8, 0.0, 0.95, 0.6])
    assert Hobbit().precision(weight)[0].tolist() == [LOW, HIGH, SKIP, HIGH]
    assert Hobbit(high=0.5).precision(weight)[1, :2].tolist() == [HIGH, HIGH]
    # with two experts the second is high exactly where the first has at most T1
    for first in (0.55, 0.61):
        second = Hobbit().precision(np.array([[first, 1 - first]]))[0, 1]
        assert (second == HIGH) == (first <= 0.6)


def test_a_batch_reads_at_the_highest_precision_asked_for():
    expert = np.array([[0, 1, 2], [1, 0, -1]])
    weight = np.array([[0.7, 0.25, 0.05], [0.9, 0.1, 0.0]])
    assert Hobbit().read(expert, weight) == {0: HIGH, 1: HIGH, 2: SKIP}
    assert Hobbit().read(expert[:1], weight[:1]) == {0: HIGH, 1: LOW, 2: SKIP}


def test_thresholds_are_checked():
    with pytest.raises(OptionError, match=r"high=0.9, low=0.6: expected 0 <= high <= low <= 1"):
        Hobbit(high=0.9, low=0.6)


def test_tuned_weights_cost_no_more_and_sum_to_one():
    trace = random_trace(4)

    def penalty(policy):
        return replay(trace, policy, 8).misses

    best = Hobbit().tuned(penalty)
    assert bound(trace, 8).misses <= penalty(best.policy()) <= penalty(Hobbit().policy())
    assert best.recency + best.frequency + best.weighty + best.nearness == pytest.approx(1.0)
