"""The budget solver against brute force, and the rules it must keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.plan.candidates import candidate, distinct, single_methods, solved
from moekit.plan.cost import LayerCost
from moekit.plan.document import Plan
from moekit.plan.planner import Site
from moekit.plan.solve import (
    MENU,
    Weights,
    _bends,
    counts_allowed,
    in_order,
    layer_menu,
    layer_plan,
    smallest,
    solve,
    uniform,
)

BYTES = {(16, 64): 100, (8, 64): 53, (4, 64): 28}


def cost(name: str, drop, rough, site: Site | None = None) -> LayerCost:
    drop = np.asarray(drop, float)
    noise = {(16, 64): np.zeros(len(drop)), (8, 64): np.asarray(rough) * 0.01, (4, 64): np.asarray(rough)}
    site = site or Site(name, len(drop), 2)
    return LayerCost(site, drop, noise, BYTES, 1, {"output energy": drop, "reversed": -drop}, drop, np.eye(len(drop)))


def weights(costs, drop: float = 1.0, noise: float = 1.0) -> Weights:
    return Weights({c.site.name: drop for c in costs}, {c.site.name: noise for c in costs})


def brute(costs, budget: int, scale: Weights) -> float:
    """The least loss over every way to keep the best of each layer, each at any precision."""
    best = []
    for c in costs:
        order, ways = in_order(c, "output energy"), []
        for m in range(c.site.top_k, c.site.num_experts + 1):
            lost = scale.drop[c.site.name] * sum(c.drop[e] for e in order[m:])
            for pick in itertools.product(BYTES, repeat=m):
                rounding = scale.noise[c.site.name] * sum(c.noise[p][e] for p, e in zip(pick, order[:m], strict=True))
                ways.append((sum(BYTES[p] + 1 for p in pick), lost + rounding))
        best.append(ways)
    return min(a[1] + b[1] for a in best[0] for b in best[1] if a[0] + b[0] <= budget)


numbers = st.lists(st.integers(1, 50).map(float), min_size=3, max_size=3)


@settings(max_examples=25)
@given(numbers, numbers, numbers, numbers, st.integers(smallest([cost("a", [1] * 3, [1] * 3)] * 2), 640))
def test_equals_brute_force(drop_a, drop_b, rough_a, rough_b, budget) -> None:
    costs = [cost("a", drop_a, rough_a), cost("b", drop_b, rough_b)]
    scale = Weights({"a": 1.0, "b": 2.0}, {"a": 0.5, "b": 0.25})
    found = solve(costs, scale, "output energy", budget)
    assert found.nbytes <= budget
    assert found.loss == pytest.approx(brute(costs, budget, scale))
    assert sum(p.nbytes for p in found.points.values()) == found.nbytes


def test_too_small_a_budget_has_no_solution() -> None:
    costs = [cost("a", [1, 2, 3], [1, 1, 1])]
    assert smallest(costs) == 2 * 29
    assert solve(costs, weights(costs), "output energy", 57) is None
    assert solve(costs, weights(costs), "output energy", 58).nbytes == 58


def test_a_large_budget_changes_nothing_and_a_plan_says_what_was_chosen() -> None:
    costs = [cost("a", [3, 1, 2], [1, 1, 1])]
    whole = solve(costs, weights(costs), "output energy", 10**6).points["a"]
    assert layer_plan(whole, costs[0], "").untouched
    tight = solve(costs, weights(costs, drop=0.01), "output energy", 202).points["a"]
    plan = layer_plan(tight, costs[0], "why")
    assert sorted(plan.sources) == [0, 2]
    assert [e.bits for e in plan.experts] == [16, 16]
    rounded = solve(costs, weights(costs, noise=0.01), "output energy", 202).points["a"]
    assert len(rounded.kept) == 3


def test_precision_alone_keeps_every_expert() -> None:
    costs = [cost("a", [0, 0, 9], [5, 5, 5])]
    found = solve(costs, weights(costs), "output energy", 200, drop=False)
    assert len(found.points["a"].kept) == 3
    assert len(solve(costs, weights(costs), "output energy", 202).points["a"].kept) == 2


def test_groups_go_in_whole_rounds() -> None:
    site = Site("a", 8, 2, groups=(2, 1))
    one = cost("a", [8, 1, 2, 3, 7, 6, 5, 4], [1] * 8, site)
    assert in_order(one, "output energy") == (0, 4, 3, 5, 2, 6, 1, 7)
    assert counts_allowed(one) == [4, 6, 8]
    assert {len(point.kept) for point in layer_menu(one, weights([one]), "output energy")} <= {4, 6, 8}


def test_menus_are_pareto_fronts() -> None:
    menu = layer_menu(one := cost("a", np.arange(1, 9), np.arange(8, 0, -1)), weights([one]), "output energy")
    assert all(a.nbytes < b.nbytes and a.loss > b.loss for a, b in itertools.pairwise(menu))
    assert menu[-1].loss == 0
    for point in menu:
        plan = candidate("x", [point], [one], weights([one]), "s")
        assert plan.predicted == pytest.approx(point.loss)
        assert plan.nbytes == point.nbytes


def test_thinning_keeps_the_ends_and_the_bends() -> None:
    nbytes = np.arange(1000)
    loss = np.where(nbytes < 500, 1000 - nbytes, 500 - 0.1 * (nbytes - 500))
    kept = _bends(nbytes, loss)
    assert len(kept) <= MENU
    assert kept[0] == 0
    assert kept[-1] == 999
    assert 499 in kept or 500 in kept


def test_single_methods_are_the_largest_uniform_that_fit() -> None:
    costs = [cost(n, [1, 2, 3, 4], [1] * 4) for n in "ab"]
    found = {c.name: c for c in single_methods(costs, weights(costs), ["output energy", "reversed"], 500, "s")}
    assert found["2 of 4 experts by output energy"].nbytes == 404
    assert sorted(found["2 of 4 experts by reversed"].plan.layers["a"].sources) == [0, 1]
    assert found["all experts at 8 bits in groups of 64"].nbytes == 432
    assert all(one.nbytes <= 500 for one in found.values())
    assert not list(single_methods(costs, weights(costs), ["output energy"], 100, "s"))


def test_the_solver_is_at_least_as_good_as_any_single_method_by_its_own_prediction() -> None:
    costs = [cost("a", [1, 2, 3, 9], [4, 3, 2, 1]), cost("b", [5, 5, 5, 5], [1, 1, 1, 1])]
    scale = weights(costs)
    for budget in range(240, 820, 20):
        best = min(c.predicted for c in solved(costs, scale, ["output energy"], budget, "s"))
        singles = [c.predicted for c in single_methods(costs, scale, ["output energy", "reversed"], budget, "s")]
        assert not singles or best <= min(singles) + 1e-12


def test_uniform_and_distinct() -> None:
    one = cost("a", [1, 2, 3], [1, 1, 1])
    point = uniform(one, weights([one]), "output energy", 2, (8, 64))
    assert (point.kept, point.nbytes) == ((2, 1), 108)
    assert point.loss == pytest.approx(1.02)
    twice = [candidate(name, [point], [one], weights([one]), "s") for name in ("x", "y")]
    assert [c.name for c in distinct(twice)] == ["x"]


def test_a_solution_whose_plan_is_too_large_is_sought_again_in_less() -> None:
    costs = [cost("a", [9, 5, 4, 2], [4, 3, 2, 1]), cost("b", [7, 6, 5, 1], [1, 2, 3, 4])]
    scale, header = weights(costs), 90

    def over(plan: Plan) -> int:
        stored = [expert for layer in plan.layers.values() for expert in layer.experts]
        return sum(BYTES[e.bits, e.group_size] + 1 for e in stored) + header - 400

    for one in solved(costs, scale, ["output energy"], 400, "source", over=over):
        assert one.nbytes + header <= 400
        assert over(one.plan) <= 0
    best = next(solved(costs, scale, ["output energy"], 400, "source", over=over))
    assert best.predicted == pytest.approx(brute(costs, 400 - header, scale))
    assert not list(solved(costs, scale, ["output energy"], 400, "source", over=lambda plan: 100))
