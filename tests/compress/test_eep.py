"""EEP: one-hot candidates are slices, the two phases, resuming to the same bytes, and what a fitness must be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moekit.compress import eep, method
from moekit.compress.eep import Draw, Group, divided, expressed
from moekit.errors import OptionError, PlanError
from moekit.plan import LayerPlan, Plan
from moekit.plan.planner import Site
from moekit.plan.recombine import recombined
from moekit.plan.values import spooling

NAME = "model.layers.0.mlp"
SITE = Site(NAME, 8, 2)


def target(plan: Plan) -> float:
    """Least where the first stored expert is the mean of experts 0 and 1, and expert 5 is kept whole."""
    total = 0.0
    for layer in plan.layers.values():
        matrix = layer.matrix()
        total += float(np.square(matrix[0] - [0.5, 0.5, 0, 0, 0, 0, 0, 0]).sum() + np.square(matrix[:, 5].max() - 1))
    return total


def test_one_hot_is_slicing_and_the_identity_reproduces(model) -> None:
    bank = model.banks[NAME]
    plan = expressed((Group((1, 4, 6)),), [[SITE]])[NAME]
    assert plan == LayerPlan.keep([1, 4, 6], 8, why=plan.why)
    weighed = expressed((Group((1, 4, 6), np.eye(8)[[1, 4, 6]]),), [[SITE]])[NAME]
    assert weighed == plan
    made = recombined(bank, plan)
    assert torch.equal(made.gate_up, bank.gate_up[[1, 4, 6]])
    assert torch.equal(made.down, bank.down[[1, 4, 6]])
    assert expressed((Group(tuple(range(8))),), [[SITE]])[NAME].untouched


def test_mixtures_are_sums_and_lower_to_a_router_of_source_rows(model) -> None:
    weights = np.zeros((2, 8))
    weights[0, [0, 3]], weights[1, 5] = [0.75, -0.5], 1.25
    layer = expressed((Group((0, 5), weights),), [[SITE]])[NAME]
    assert layer.plain_slots
    assert layer.rows == (((0, 1.0),), ((5, 1.0),))
    bank = model.banks[NAME]
    made = recombined(bank, layer)
    assert torch.allclose(made.down[0], 0.75 * bank.down[0] - 0.5 * bank.down[3])
    assert torch.allclose(made.down[1], 1.25 * bank.down[5])


def test_phase_two_is_no_worse_than_phase_one_and_better_than_random(model) -> None:
    both = method("eep:keep=3,evaluations=120,discrete=40").plan(None, model, target)
    random = method("eep:keep=3,evaluations=120,discrete=120,initial=120").plan(None, model, target)
    pruned = method("eep:keep=3,evaluations=120,discrete=1.0").plan(None, model, target)
    assert all(expert.plain for layer in pruned.layers.values() for expert in layer.experts)
    assert any(not expert.plain for layer in both.layers.values() for expert in layer.experts)
    assert target(both) < target(pruned) <= target(random)
    assert f"measured at {target(both):.6g}" in both.layers[NAME].why


def test_best_of_random_and_the_search_share_their_first_draws(model) -> None:
    def measured(spec: str) -> list[Plan]:
        plans: list[Plan] = []
        method(spec).plan(None, model, lambda plan: plans.append(plan) or target(plan))
        return plans

    search, random = measured("eep:keep=3,evaluations=40"), measured("eep:keep=3,evaluations=40,discrete=40,initial=40")
    assert len(search) == len(random) == 40
    assert [p.layers for p in search[:3]] == [p.layers for p in random[:3]]
    assert search[3].layers != random[3].layers


def test_an_interrupted_search_ends_in_the_same_bytes(model, tmp_path) -> None:
    spec = "eep:keep=3,evaluations=30,seed=5"
    whole = method(spec).plan(None, model, target)
    left = [17]

    def failing(plan: Plan) -> float:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return target(plan)

    with spooling(tmp_path), pytest.raises(KeyboardInterrupt):
        method(spec).plan(None, model, failing)
    asked: list[Plan] = []
    with spooling(tmp_path):
        again = method(spec).plan(None, model, lambda plan: asked.append(plan) or target(plan))
    assert again == whole
    assert again.fingerprint == whole.fingerprint
    assert len(asked) == 30 - 17 + 1


def test_seeds_differ_and_repeat(model) -> None:
    plans = [method(f"eep:keep=3,evaluations=12,seed={seed}").plan(None, model, target) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].layers != plans[2].layers


def test_groups_of_layers_share_their_mixture(model) -> None:
    model.sites += [Site("model.layers.1.mlp", 8, 2), Site("model.layers.2.mlp", 8, 2)]
    model.sites = [replace(SITE, name=f"model.layers.{i}.mlp") for i in range(4)]
    layers = method("eep:keep=3,evaluations=20,groups=2").plan(None, model, target).layers
    experts = [layers[site.name].experts for site in model.sites]
    assert experts[0] == experts[1]
    assert experts[2] == experts[3]
    assert experts[1] != experts[2]
    model.sites[1] = replace(model.sites[1], num_experts=6)
    with pytest.raises(
        OptionError, match=r"puts model.layers.0.mlp \(8 experts\) and model.layers.1.mlp \(6\) together"
    ):
        method("eep:keep=3,evaluations=20,groups=2").plan(None, model, target)


def test_routing_groups_stay_even_through_moves_and_crosses(model) -> None:
    model.sites = [Site(NAME, 16, 2, groups=(4, 2))]
    plans: list[Plan] = []
    method("eep:keep=8,evaluations=60,discrete=20").plan(None, model, lambda plan: plans.append(plan) or len(plans) / 9)
    rows = {tuple(row[0][0] for row in plan.layers[NAME].rows) for plan in plans}
    assert len(rows) > 5
    assert all([sum(e // 4 == g for e in each) for g in range(4)] == [2, 2, 2, 2] for each in rows)
    assert all(list(each) == sorted(set(each)) for each in rows)


def test_crosses_never_use_a_router_row_twice() -> None:
    draw = Draw(np.random.default_rng(0), [SITE], 3)
    one, two = Group((0, 3, 6)), Group((1, 3, 5), np.full((3, 8), 0.5))
    for _ in range(50):
        rows, weights = draw._cross_group(one, two, SITE, True)
        assert list(rows) == sorted(set(rows))
        for row, row_E in zip(rows, weights, strict=True):
            owner = "two" if row_E[7] == 0.5 else "one"
            assert row in (two if owner == "two" else one).rows
    assert draw._cross_group(Group((0, 1)), Group((1, 2)), SITE, True).rows != (1, 1)


def test_rows_of_small_or_negative_sum_are_not_divided() -> None:
    weights = np.array([[2.0, 2.0], [0.05, 0.0], [-3.0, 1.0]])
    assert divided(Group((0, 1, 2), weights)).weights.tolist() == [[0.5, 0.5], [0.05, 0.0], [-3.0, 1.0]]
    layer = expressed((Group((4,), np.zeros((1, 8))),), [[SITE]])[NAME]
    assert layer.experts[0].parts == ((4, 0.0),)


def test_fitness_in_points() -> None:
    divergence, error = (method(f"eep:fitness={fitness}") for fitness in ("divergence", "error"))
    assert [divergence.points(loss) for loss in (0.0, np.log(2), np.inf)] == [100.0, 50.0, 0.0]
    assert [error.points(loss) for loss in (0.0, 0.25, 1.0)] == [100.0, 75.0, 0.0]


def test_what_cannot_be_searched_is_one_clear_line(model) -> None:
    with pytest.raises(OptionError, match="has nothing to measure on"):
        method("eep").plan(None, model)
    with pytest.raises(PlanError, match="measuring plan 1 of the search gave nan"):
        method("eep").plan(None, model, lambda plan: float("nan"))
    with pytest.raises(PlanError, match="it has only 8 experts"):
        method("eep:keep=9").plan(None, model, target)
    for bad in ("evaluations=0", "evaluations=10,discrete=11", "evaluations=10,discrete=5,initial=6"):
        with pytest.raises(OptionError, match="give 1 <= initial <= discrete <= evaluations"):
            method(f"eep:{bad}")
    with pytest.raises(OptionError, match="groups=-1 of layers"):
        method("eep:groups=-1")


def test_a_planted_fault_shows(model, monkeypatch) -> None:
    """A phase 2 that nudges nothing finds nothing that pruning did not."""
    monkeypatch.setattr(eep, "SCALE", 0.0)
    stuck = method("eep:keep=3,evaluations=60,discrete=30").plan(None, model, target)
    monkeypatch.undo()
    free = method("eep:keep=3,evaluations=60,discrete=30").plan(None, model, target)
    assert target(free) < target(stuck)
