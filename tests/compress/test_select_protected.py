"""Protected experts stay in every selection, or it says that it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.compress._select import keep_best, keep_best_of_all
from moekit.errors import PlanError
from moekit.plan.planner import Site

SITE = Site("a", 8, 2)
GROUPED = Site("a", 8, 2, (4, 2))


@given(st.sets(st.integers(-2, 7), max_size=4), st.integers(4, 8), st.permutations(range(8)))
def test_protected_experts_stay_and_the_best_fill_up(protected, keep, order) -> None:
    score = np.array(order, float)
    kept = keep_best(score, keep, SITE, why="test", protected=protected).sources
    guarded = {e for e in protected if e >= 0}
    assert guarded <= kept
    others = sorted(set(range(8)) - guarded, key=lambda e: -score[e])
    assert kept == guarded | set(others[: keep - len(guarded)])


def test_more_protected_than_places_is_refused() -> None:
    with pytest.raises(PlanError, match=r"keep=2 leaves 2 of 8 experts, too few for the 3 .* keep at least 3"):
        keep_best(np.arange(8.0), 2, SITE, why="test", protected=[0, 1, 2])
    with pytest.raises(PlanError, match=r"leaves 4 of 8 experts, too few for the 2 .*expert 0 would.* at least 8"):
        keep_best(np.arange(8.0), 4, GROUPED, why="test", protected=[0, 1])
    assert keep_best(np.arange(8.0), 4, GROUPED, why="test", protected=[0, 2]).sources == {0, 2, 5, 7}


def test_one_budget_over_all_layers_covers_the_protected_first() -> None:
    sites = {name: Site(name, 8, 2) for name in "ab"}
    scores = {"a": np.arange(8.0), "b": np.arange(8.0) + 100}
    plans = keep_best_of_all(scores, 4, sites, why="test", protected={"a": [0, 1, 2, -1]})
    assert plans["a"].sources == {0, 1, 2}
    assert plans["b"].sources == {3, 4, 5, 6, 7}
    with pytest.raises(PlanError, match=r"keep=2 leaves 4 experts over all layers, fewer than the 5 that"):
        keep_best_of_all(scores, 2, sites, why="test", protected={"a": [0, 1, 2]})


def test_groups_cover_the_protected_in_whole_rounds() -> None:
    sites = {name: Site(name, 16, 2, (4, 2)) for name in "ab"}
    scores = {"a": np.zeros(16), "b": np.ones(16)}
    free = keep_best_of_all(scores, 8, sites, why="test")
    assert [len(plan.sources) for plan in free.values()] == [4, 12]
    plans = keep_best_of_all(scores, 8, sites, why="test", protected={"a": [6, 7]})
    assert [len(plan.sources) for plan in plans.values()] == [8, 8]
    assert {6, 7} <= plans["a"].sources
