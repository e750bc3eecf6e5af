"""Low rank among the forms of `fit`: exact where experts have that rank, solved with bits and drops, never forced."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fitting import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moekit.checkpoint import Checkpoint
from moekit.formats import LowRankBank
from moekit.plan import LiveLoss, apply, fit, verify
from moekit.plan.candidates import Candidate, candidate, distinct, rows_kept
from moekit.plan.cost import WHOLE, Form, LayerCost, layer_cost, rank_errors
from moekit.plan.explain import ranks_in
from moekit.plan.low_rank import Rank, factored, ranks_of, truncated
from moekit.plan.planner import Site
from moekit.plan.sizes import plan_nbytes, source_nbytes
from moekit.plan.solve import Weights, in_order, layer_menu, solve, uniform
from moekit.profile import Profile, profile
from moekit.stream import LoadedModel

TRUE = 3
"""Rank that the planted experts have."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose experts have rank 3."""

    def fill(name: str, weight: torch.nn.Parameter) -> None:
        if "experts" in name:
            e, rows, columns = weight.shape
            parts = 2 if "gate_up" in name else 1
            made = torch.randn(e * parts, rows // parts, TRUE) @ torch.randn(e * parts, TRUE, columns) * 0.2
            weight.data = made.reshape(e, rows, columns)
        elif "gate" in name:
            torch.nn.init.normal_(weight, std=0.3)

    path = tmp_path_factory.mktemp("planted")
    return tiny(path, fill, hidden_size=48, moe_intermediate_size=32, intermediate_size=32, num_experts=4)


@pytest.fixture(scope="module")
def seen(planted: Checkpoint) -> Profile:
    draw = np.random.default_rng(0)
    texts = {"a": ["".join(map(chr, draw.integers(64, 96, 256))) for _ in range(4)]}
    return profile(planted, texts, sequence_length=64, held_out=0.3)


@pytest.fixture(scope="module")
def loss(planted: Checkpoint, seen: Profile) -> LiveLoss:
    runner = LoadedModel.load(planted)
    return LiveLoss(runner, planted, [piece for pieces in seen.held_out.values() for piece in pieces])


def test_experts_of_low_rank_are_stored_as_factors(planted, seen, loss) -> None:
    found = fit(planted, seen, ratio=0.4, evaluate=loss)
    ranks = [rank for layer in found.plan.layers.values() for rank in ranks_in(layer)]
    assert ranks
    assert min(ranks) >= TRUE
    assert found.measured == pytest.approx(loss(found.plan))
    assert found.nbytes == plan_nbytes(found.plan, planted) <= found.budget.nbytes
    assert found.low_rank
    assert any(re.match(r"Low rank: \d at rank \d.*; their factors", line) for line in found.levers)
    without = fit(planted, seen, ratio=0.4, evaluate=loss, low_rank=False)
    assert not [rank for layer in without.plan.layers.values() for rank in ranks_in(layer)]
    assert not any(line.startswith("Low rank") for line in without.levers)
    eased = fit(planted, seen, ratio=0.05, evaluate=loss)
    assert any(line.startswith("Low rank: ") for line in eased.levers)
    assert found.measured < without.measured / 4
    loss.restore()


@torch.no_grad()
def test_layers_of_factors_and_of_integers_lie_in_one_checkpoint(planted, seen, tmp_path, quick_reload) -> None:
    plan = fit(planted, seen, ratio=0.4).plan
    assert {layer.values.format if layer.values else layer.experts[0].bits for layer in plan.layers.values()} > {
        LowRankBank.FORMAT
    }
    apply(planted, plan, tmp_path / "out")
    verify(tmp_path / "out", planted, plan=plan).require()
    ids = torch.from_numpy(np.asarray(seen.held_out["a"][0]).astype(np.int64))[None]
    runner = LoadedModel.load(planted)
    live = LiveLoss(runner, planted, [ids[0].numpy()])
    live.become(plan)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(runner.model(input_ids=ids).logits, written, atol=2e-4, rtol=1e-4)


def test_formats_that_hold_no_factors_get_none(planted, seen) -> None:
    found = fit(planted, seen, ratio=0.25, format="stock")
    assert not found.low_rank
    assert all(layer.values is None for one in found.candidates for layer in one.plan.layers.values())
    assert not fit(planted, seen, ratio=0.25, weights=False).low_rank


def test_costs_of_ranks(planted, seen) -> None:
    layer = planted.moe_layers[0]
    bank, ranks = planted.bank(layer.name), ranks_of(layer)
    assert max(ranks).rank * (48 + 32) < 48 * 32
    errors = rank_errors(bank, (Rank(1), Rank(TRUE), Rank(8)))
    assert (errors[Rank(1)] > 1e-3).all()
    assert (errors[Rank(TRUE)] < 1e-9).all()
    cost = layer_cost(planted, layer, seen.layers[layer.name], ranks=ranks)
    assert cost.ranks == ranks
    for rank in ranks:
        stored = factored(bank.select([0]), [rank])
        assert 0 < cost.nbytes[rank] - stored.nbytes < 6 * 200
    assert layer_cost(planted, layer, seen.layers[layer.name], ranks=ranks, weights=False).ranks == ()


def test_a_truncation_is_the_decomposition_at_that_rank(planted) -> None:
    bank = planted.bank(planted.moe_layers[0].name)
    noisy = replace(bank, gate_up=torch.randn_like(bank.gate_up), down=torch.randn_like(bank.down))
    for rank, found in truncated(noisy, (Rank(9), Rank(4))):
        found.checked()
        alone = LowRankBank.factorise(noisy, rank.rank)
        for e in range(noisy.num_experts):
            torch.testing.assert_close(found.expert(e).down, alone.expert(e).down, atol=1e-5, rtol=1e-4)
    assert list(truncated(noisy, ())) == []


FORMS = {WHOLE: 100, (8, 64): 53, (4, 64): 28, Rank(8): 60, Rank(2): 20}
numbers = st.lists(st.integers(1, 50).map(float), min_size=3, max_size=3)


def cost(drop: list[float], rough: list[float], cut: list[float], name: str = "a") -> LayerCost:
    drop_E, rough_E, cut_E = (np.asarray(value, float) for value in (drop, rough, cut))
    noise: Any = {WHOLE: 0 * rough_E, (8, 64): rough_E * 0.01, (4, 64): rough_E, Rank(8): cut_E, Rank(2): 3 * cut_E}
    return LayerCost(Site(name, 3, 2), drop_E, noise, FORMS, 1, {"energy": drop_E}, drop_E, np.eye(3))


@settings(max_examples=40)
@given(numbers, numbers, numbers, st.integers(42, 310))
def test_the_solver_mixes_ranks_exactly(drop, rough, cut, budget) -> None:
    """Against every way to store a layer, where integers and factors exclude each other."""
    one = cost(drop, rough, cut)
    unit = Weights({"a": 1.0}, {"a": 1.0})
    order, ways = in_order(one, "energy"), []
    for m in (2, 3):
        for kind in ((WHOLE, (8, 64), (4, 64)), (WHOLE, Rank(8), Rank(2))):
            for pick in itertools.product(kind, repeat=m):
                lost = sum(drop[e] for e in order[m:])
                lost += sum(one.noise[form][e] for form, e in zip(pick, order[:m], strict=True))
                ways.append((sum(FORMS[form] + 1 for form in pick), lost))
    best = min((lost for size, lost in ways if size <= budget), default=None)
    found = solve([one], unit, "energy", budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.loss == pytest.approx(best)
        assert found.nbytes <= budget
        kinds = {isinstance(form, Rank) for form in found.points["a"].forms if form != WHOLE}
        assert len(kinds) <= 1
    assert all(point.nbytes >= 42 for point in layer_menu(one, unit, "energy"))


def test_plans_of_factors_are_told_apart_and_keep_their_rows(planted, seen) -> None:
    costs = [
        layer_cost(planted, layer, seen.layers[layer.name], ranks=(Rank(4), Rank(2), Rank(1)))
        for layer in planted.moe_layers
    ]
    unit = Weights(*[{c.site.name: 1.0 for c in costs}] * 2)

    def all_at(form: Form) -> Candidate:
        points = [uniform(c, unit, "frequency", 4, form) for c in costs]
        return candidate("all", points, costs, unit, planted.fingerprint)

    alike = [all_at(WHOLE), all_at(Rank(4)), all_at(Rank(2))]
    assert distinct([*alike, all_at(Rank(2))]) == alike
    assert "4 at rank 4" in next(iter(alike[1].plan.layers.values())).why
    assert plan_nbytes(alike[2].plan, planted) < plan_nbytes(alike[1].plan, planted) < source_nbytes(planted)
    points = [layer_menu(c, unit, "frequency")[0] for c in costs]
    least = candidate("least", points, costs, unit, planted.fingerprint)
    assert all(ranks_in(layer) == [1] * len(layer.experts) for layer in least.plan.layers.values())
    assert list(rows_kept(least, costs, planted.bank)) == []
