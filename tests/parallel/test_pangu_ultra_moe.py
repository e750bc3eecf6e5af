"""Pangu Ultra MoE: modelled steps add up, copies between nodes are counted, moves are made only where they pay."""

import numpy as np
import pytest

from moekit.errors import OptionError
from moekit.lab.experiments import _placing
from moekit.lab.experiments import pangu_ultra_moe as experiment
from moekit.measure.machine import INTER, INTRA, CostModel, Law
from moekit.parallel._links import Grid
from moekit.parallel._placement_shape import Shape, exchange_seconds, fastest, step_seconds
from moekit.parallel.pangu_ultra_moe import PanguUltraMoE, between_nodes, kept_names
from moekit.parallel.placement import Placement
from moekit.profile import RoutingTrace

FLOPS = CostModel(Law({"call": 0.0, "flops": 1.0, "nbytes": 0.0}), Law({"call": 0.0, "nbytes": 0.0}))
LINKED = CostModel(
    FLOPS.product,
    FLOPS.disk,
    {INTRA: Law({"call": 1.0, "nbytes": 0.0}), INTER: Law({"call": 100.0, "nbytes": 0.0})},
)


def test_flops_of_a_step_are_those_of_its_products():
    shape = Shape(3, hidden=8, experts=4, top_k=2, inner=16, shared=1)
    per_token = 2 * (4 * 8 * 8 + 8 * 4 + 3 * 8 * 16 * (2 + 1))
    assert step_seconds(shape, 10, FLOPS) == pytest.approx(3 * 10 * per_token)
    assert step_seconds(shape, 10, FLOPS, devices=4) == pytest.approx(3 * 10 * per_token)  # tokens per device
    assert shape.parameters == 3 * (4 * 64 + 32 + 3 * 8 * 16 * 5)


def test_small_products_cost_more_calls():
    calls = CostModel(Law({"call": 1.0, "flops": 0.0, "nbytes": 0.0}), FLOPS.disk)
    few, many = (Shape(1, hidden=8, experts=e, top_k=2, inner=64 // e) for e in (4, 16))
    assert step_seconds(few, 10, calls) == 4 + 1 + 3 * 4
    assert step_seconds(many, 10, calls) == 4 + 1 + 3 * 16
    assert fastest([few, many], 10, calls, few.parameters) == few


def test_messages_of_an_exchange():
    """Two-level: n - 1 messages between nodes, m - 1 inside, there and back, in every layer."""
    shape = Shape(5, hidden=8, experts=16, top_k=2, inner=4)
    assert exchange_seconds(shape, 10, LINKED, nodes=3, per_node=4) == 5 * 2 * (2 * 100 + 3)
    assert exchange_seconds(shape, 10, LINKED, nodes=1, per_node=4) == 5 * 2 * 3
    assert exchange_seconds(shape, 10, LINKED, nodes=1, per_node=1) == 0


def test_copies_between_nodes_by_hand():
    expert = np.array([[[0, 1]], [[2, 3]], [[0, 2]]])
    trace = RoutingTrace(
        expert, np.ones(expert.shape), np.zeros(3, int), np.zeros(3), np.zeros(3, bool), (4,), np.zeros(3, int)
    )
    placement = Placement(np.array([[0, 1, 2, 3]]), Grid.of(4, 2))
    # From node 0: the first stays, the second needs both devices of node 1, the third one of them.
    found = between_nodes(placement, trace)
    assert found == {"flat": pytest.approx(3 / 3), "once per node": pytest.approx(2 / 3), "gathered": 1.0}


def test_loads_that_stay_are_placed_once():
    loads = np.tile(np.array([[9.0, 9, 1, 1]]), (6, 1, 1))
    found = PanguUltraMoE().drift(loads, Grid.of(2), row=1.0, move=1.0)
    assert found.busiest.tolist() == [18, 10, 10, 10, 10, 10]
    assert found.moved.tolist() == [0, 2, 0, 0, 0, 0]
    assert found.seconds(1.0, 1.0) == 68 + 2


def test_moves_that_do_not_pay_are_not_made():
    loads = np.tile(np.array([[9.0, 9, 1, 1]]), (6, 1, 1))
    # 8 rows saved in each of 4 steps against two moves: worth it below 16 rows a move.
    assert PanguUltraMoE().drift(loads, Grid.of(2), 1.0, 15.9).moved.sum() == 2
    assert PanguUltraMoE().drift(loads, Grid.of(2), 1.0, 16.0).moved.sum() == 0
    assert PanguUltraMoE(window=2).drift(loads, Grid.of(2), 1.0, 15.9).moved.sum() == 0


def test_the_future_is_not_seen():
    """What a step does depends on the steps before it alone."""
    rng = np.random.default_rng(0)
    loads = rng.dirichlet(np.full(8, 0.3), (10, 2)) * 100
    whole = PanguUltraMoE().drift(loads, Grid.of(4), 1.0, 1.0)
    part = PanguUltraMoE().drift(loads[:6], Grid.of(4), 1.0, 1.0)
    assert np.array_equal(whole.busiest[:6], part.busiest)
    assert np.array_equal(whole.moved[:6], part.moved)


def test_names_are_kept_where_they_can_be():
    before = np.array([0, 0, 1, 1, 2, 2])
    assert kept_names(before, np.array([2, 2, 0, 0, 1, 1]), 3).tolist() == before.tolist()
    assert (kept_names(before, np.array([1, 1, 1, 0, 0, 2]), 3) != before).sum() <= 3


def test_options():
    with pytest.raises(OptionError, match="window=0 predicts nothing"):
        PanguUltraMoE(window=0)


def figures(low=0.95, saves=0.01, copies=True):
    return {
        "shapes": {"rank correlation": {"low": low}},
        "drift": {"followed saves": {"low": saves}},
        "every seed saves copies": copies,
    }


def test_each_condition_of_the_experiment_can_fail():
    assert experiment.holds(figures())
    assert not experiment.holds(figures(low=0.89))
    assert not experiment.holds(figures(saves=0.0))
    assert not experiment.holds(figures(copies=False))


def test_the_experiment_runs_small(monkeypatch):
    monkeypatch.setattr(experiment, "DOMAINS", ("arithmetic", "sorting"))
    monkeypatch.setattr(_placing, "OTHERS", ())
    for name, value in {"SHAPES": 2, "SEQUENCES": 4}.items():
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setattr(experiment.CostModel, "fit", lambda: LINKED)
    found = experiment.run((1, 2), None, lambda done, total: None)
    assert found.shown is experiment.holds(found.figures)
    sent = found.figures["sent"]
    assert sent["once per node"]["mean"] < sent["flat"]["mean"]
    assert found.figures["drift"]["oracle with free moves saves"]["mean"] >= 0
    assert CostModel.of_dict(found.setting["cost model"]) == LINKED


def test_tables_of_the_scale_page():
    from moekit.parallel import _placement_scale

    page = (
        "a\n<!-- begin measured -->\nold\n<!-- end measured -->\nb\n<!-- begin modelled -->\n<!-- end modelled -->\nc\n"
    )
    cost = CostModel(
        Law({"call": 1e-6, "flops": 1e-10, "nbytes": 0.0}, 0.25, 0.5, 7),
        Law({"call": 1e-4, "nbytes": 1e-9}, 0.1, 0.2, 5),
        {INTRA: Law({"call": 1e-5, "nbytes": 1e-9}, 0.1, 0.2, 6)},
    )
    done = _placement_scale.filled(page, cost, "2026-11-22", "any machine")
    assert "old" not in done
    assert [part in done for part in ("a\n", "\nb\n", "\nc\n")] == [True] * 3
    assert "| product of one thread | 1 us | 10 GFLOP/s, GB/s not limiting | 25% (50%) | 7 |" in done
    assert "| 256 | 32 | 1 |" in done
    assert _placement_scale.filled(done, cost, "2026-11-22", "any machine") == done
    shares = [line.split("|")[-2] for line in _placement_scale.modelled(_placement_scale.ASSUMED)[4:]]
    assert [float(share) for share in shares] == sorted(map(float, shares))
