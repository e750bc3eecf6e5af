"""Selection over all layers at once: one budget, spent where scores are highest."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moekit.compress._select import keep_best, keep_best_of_all
from moekit.plan.planner import Site

SITES = {name: Site(name, 6, 2) for name in "abc"}


def counts(plans) -> list[int]:
    return [len(plan.experts) for plan in plans.values()]


def test_the_budget_goes_where_the_scores_are() -> None:
    scores = {"a": np.arange(6.0), "b": np.arange(6.0) * 10, "c": np.zeros(6)}
    plans = keep_best_of_all(scores, 0.5, SITES, why="test")
    assert counts(plans) == [2, 5, 2]
    assert plans["b"].sources == {1, 2, 3, 4, 5}


@given(st.lists(st.integers(0, 5), min_size=18, max_size=18), st.integers(2, 6))
def test_the_budget_is_met_and_nothing_better_is_left(values, keep) -> None:
    scores = {name: np.array(values[i * 6 : i * 6 + 6], float) for i, name in enumerate("abc")}
    plans = keep_best_of_all(scores, keep, SITES, why="test")
    assert sum(counts(plans)) == 3 * keep
    assert min(counts(plans)) >= 2
    optional = [min(scores[n][e] for e in p.sources) for n, p in plans.items() if len(p.experts) > 2]
    left = [scores[n][e] for n, p in plans.items() for e in p.dropped]
    assert not optional or not left or min(optional) >= max(left)


def test_groups_advance_in_whole_rounds_and_protected_stay() -> None:
    sites = {"a": Site("a", 8, 2, (2, 1)), "b": Site("b", 8, 2, (2, 1))}
    scores = {"a": np.arange(8.0), "b": np.arange(8.0) + 1}
    plans = keep_best_of_all(scores, 5, sites, why="test", protected={"a": [0]})
    assert sum(counts(plans)) == 12
    assert all(count % 2 == 0 for count in counts(plans))
    assert 0 in plans["a"].sources
    assert keep_best(np.arange(6.0), 2, SITES["a"], why="test", protected=[1]).sources == {1, 5}
