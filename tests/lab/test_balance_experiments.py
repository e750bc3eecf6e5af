"""Experiments on balance, kinds of experts and gates: every condition of a rule can fail, and small runs go through."""

import math

import numpy as np
import pytest
import torch

from figures import changed
from moekit.lab.experiments import (
    _gaussian_moe,
    adamoe_vla,
    alf_lb_theory,
    cdsp_moe,
    erc_loss,
    global_lbl,
    mofme_uar,
    shiftaddvit,
    ssr,
    topk_gmoe_theory,
)
from moekit.lab.experiments import _league as league
from moekit.nn import Correction
from moekit.train.recipe import Training


def about(value, spread=0.01):
    return {"mean": value, "low": value - spread, "high": value + spread, "n": 3}


RIGHT = {
    alf_lb_theory: {"holds_on_every_seed": True, "online": {"1/n": {"octave_slope": about(0.1)}}},
    topk_gmoe_theory: {
        "parameters": {"2 of K 1": {"slope": about(-0.5)}},
        "hellinger": {"3 of K 1": {"slope": about(0.0)}, "3 of K 2": {"slope": about(-0.5)}},
        "slower by": about(0.2),
    },
    shiftaddvit: {"shifted": {"latency-aware": about(0.75)}, "rule": {"a": about(1.0), "b": about(1.0)}},
    adamoe_vla: {"rule": {"a": about(1.0), "b": about(1.0)}},
    cdsp_moe: {"rule": {"a": about(1.0), "b": about(1.0), "c": about(1.0)}},
    mofme_uar: {
        "parameters": {"modulated": about(39.0), "full": about(100.0)},
        "gaps": {"over full": about(0.0), "over one expert": about(1.0)},
    },
    global_lbl: {"rule": {"a": about(1.0), "b": about(1.0), "c": about(1.0)}},
    ssr: {
        "max_violation": {"ssr": about(1.0), "no balance": about(3.0)},
        "rule": {"load": about(2.0), "bits": about(0.1)},
    },
    erc_loss: {
        "coupling": {
            "plain": {"loss": about(1.0), "row norm": about(1.0)},
            "coupled": {"loss": about(0.05), "row norm": about(0.9)},
        },
        "rule": about(0.1),
    },
}
WRONG = [
    (alf_lb_theory, ["holds_on_every_seed"], False),
    (alf_lb_theory, ["online", "1/n", "octave_slope"], about(0.5)),
    (topk_gmoe_theory, ["parameters", "2 of K 1", "slope"], about(-0.3)),
    (topk_gmoe_theory, ["parameters", "2 of K 1", "slope"], about(-0.8)),
    (topk_gmoe_theory, ["hellinger", "3 of K 1", "slope"], about(-0.5)),
    (topk_gmoe_theory, ["hellinger", "3 of K 2", "slope"], about(-0.2)),
    (topk_gmoe_theory, ["slower by"], about(0.05)),
    (shiftaddvit, ["shifted", "latency-aware"], about(0.5)),
    (shiftaddvit, ["rule", "a"], about(0.0)),
    (adamoe_vla, ["rule", "b"], about(-1.0)),
    (cdsp_moe, ["rule", "c"], about(0.0)),
    (mofme_uar, ["parameters", "modulated"], about(41.0)),
    (mofme_uar, ["gaps", "over full"], about(-0.2)),
    (mofme_uar, ["gaps", "over one expert"], about(0.0)),
    (global_lbl, ["rule", "a"], about(0.0)),
    (ssr, ["max_violation", "ssr"], about(2.0)),
    (ssr, ["rule", "load"], about(0.0)),
    (ssr, ["rule", "bits"], about(-0.1)),
    (erc_loss, ["rule"], about(0.0)),
    (erc_loss, ["coupling", "coupled", "loss"], about(0.2)),
    (erc_loss, ["coupling", "coupled", "row norm"], about(0.4)),
]


@pytest.mark.parametrize("module", RIGHT)
def test_a_rule_holds_where_all_is_as_claimed(module):
    assert module.holds(RIGHT[module])


@pytest.mark.parametrize(("module", "where", "value"), WRONG)
def test_each_condition_can_fail(module, where, value):
    assert not module.holds(changed(RIGHT[module], where, value))


@pytest.mark.parametrize("name", ["signs", "small"])
def test_fixed_scores_are_balanced_without_a_wrong_move_or_a_rise(name, monkeypatch):
    monkeypatch.setattr(alf_lb_theory, "STEPS", 400)
    draw = torch.Generator().manual_seed(5)
    scores = alf_lb_theory.sampled(draw, 2048, alf_lb_theory.offsets(draw))
    found = alf_lb_theory.iterated(scores, Correction(**alf_lb_theory.FIXED[name]))
    assert found["moved_wrongly"] == found["lagrangian_rises"] == 0
    assert found["max_violation"] < 0.1
    if name == "signs":
        assert found["moved_to_the_overloaded"] == 0


SMALL = [
    (alf_lb_theory, {"TOKENS": 128, "STEPS": 20, "ONLINE": 256, "JUDGE": 512, "DRIFT": 8}),
    (topk_gmoe_theory, {"SIZES": (200, 400), "SAMPLES": 1}),
    (shiftaddvit, {"FIRST": 3, "THEN": 3, "REPEATS": 1, "TEST": 64}),
    (adamoe_vla, {"FIRST": 3, "THEN": 2, "REPEATS": 1, "TEST": 64}),
    (cdsp_moe, {"STEPS": 3, "REPEATS": 1, "TEST": 64}),
    (mofme_uar, {"STEPS": 3, "REPEATS": 1, "TEST": 64}),
]


@pytest.mark.parametrize(("module", "sizes"), SMALL)
def test_a_small_run_gives_finite_figures(module, sizes, monkeypatch):
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    outcome = module.run((1, 2), None, lambda done, total: None)

    def numbers(value):
        return [n for v in value.values() for n in numbers(v)] if isinstance(value, dict) else [value]

    assert all(math.isfinite(float(n)) for n in numbers(outcome.figures))
    assert isinstance(outcome.shown, bool)


def test_micro_batches_are_apart_or_mixed_and_the_same_rows(monkeypatch):
    def one_domain(seed, tokens, mixture):
        ((domain, share),) = mixture.items()
        assert (share, tokens) == (1.0, 512)
        rows = torch.full((4, 128), league.DOMAINS.index(domain)) + torch.arange(4)[:, None] * 10
        return lambda step: {"input_ids": rows, "weight": rows.float()}

    monkeypatch.setattr(global_lbl, "draws", one_domain)
    recipe = global_lbl.contestant("micro")
    apart, mixed = (global_lbl.dealt(1, recipe.batch * recipe.length, way)(0) for way in global_lbl.WAYS)
    assert sorted(apart["input_ids"][:, 0].tolist()) == sorted(mixed["input_ids"][:, 0].tolist())
    for chunk in apart["input_ids"].chunk(4):
        assert len(set((chunk[:, 0] % 10).tolist())) == 1
    for chunk in mixed["input_ids"].chunk(4):
        assert sorted((chunk[:, 0] % 10).tolist()) == [0, 1, 2, 3]
    assert torch.equal(mixed["weight"], mixed["input_ids"].float())


def test_micro_batches_that_exchange_counts_have_the_load_loss_of_the_whole_batch():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = torch.randint(0, 256, (16, 12), generator=torch.Generator().manual_seed(3))
    found = {}
    for name in global_lbl.SCOPES:
        running = Training((recipe := global_lbl.contestant(name).with_model(**small)).build(), recipe)
        running.model.train()
        loss, parts = global_lbl.in_parts(running, running.model, {"input_ids": ids})
        found[name] = parts["load"], loss - parts["load"]
        running.end_step(1)
        whole = running.loss(running.model, {"input_ids": ids})[1]
    assert torch.isclose(found["global"][0], whole["load"], atol=1e-6)
    assert found["micro"][0] > found["global"][0] + 1e-5
    assert torch.isclose(found["micro"][1], found["global"][1], atol=1e-5)


def test_language_model_arms_differ_in_what_they_name():
    arms = erc_loss.arms() | ssr.arms()
    assert len({league.fingerprint(recipe) for recipe in arms.values()}) == len(arms)
    assert arms["alpha 2"].model["balance"]["coupling"] == {"weight": 1.0, "alpha": 2.0}
    assert arms["ssr"].model["balance"]["load"] == 0.0
    assert global_lbl.contestant("global").model["balance"]["load"]["scope"] == "accumulated"


def test_the_exact_fit_finds_the_truth_and_an_idle_third_expert():
    x, y = _gaussian_moe.draw(topk_gmoe_theory.TRUE, 1, 4000, np.random.default_rng(0))
    fit = _gaussian_moe.segmented(x, y, 2)
    assert fit.edges[0] == pytest.approx(0.1, abs=0.01)
    assert np.abs(fit.experts - topk_gmoe_theory.TRUE[:, 2:]).max() < 0.1
    truth = topk_gmoe_theory.density(topk_gmoe_theory.TRUE, 1)
    step = topk_gmoe_theory.Y[1] - topk_gmoe_theory.Y[0]
    assert np.allclose(truth.sum(1) * step, 1, atol=1e-3)
    assert _gaussian_moe.hellinger(truth, truth, step) < 0.02
    assert _gaussian_moe.hellinger(topk_gmoe_theory.cut(fit), truth, step) < 0.05


def test_likelihood_rises_and_brute_force_agrees_with_the_search():
    rng = np.random.default_rng(1)
    x, y = _gaussian_moe.draw(topk_gmoe_theory.TRUE, 1, 60, rng)
    fit = _gaussian_moe.segmented(x, y, 2, places=60, least=8)

    def likelihood(edge):
        total = 0.0
        for part in (slice(0, edge), slice(edge, 60)):
            rest = y[part] - np.polyval(np.polyfit(x[part], y[part], 1), x[part])
            total -= len(rest) * np.log(np.sqrt(np.mean(rest**2)))
        return total

    best = max(range(8, 53), key=likelihood)
    assert fit.edges[0] == pytest.approx(x[best])
    start = topk_gmoe_theory.split(fit, 0, 40.0)
    before = float(_gaussian_moe.log_density(torch.tensor(start), torch.tensor(x), torch.tensor(y), 2).mean())
    assert _gaussian_moe.maximise(start, x, y, 2)[1] >= before


def test_cells_and_top_k_gates():
    loss, sizes = _gaussian_moe.voronoi(
        np.array([[0.0, 0, 1], [0.2, 0, 1], [5, 5, 1]]), np.array([[0.0, 0, 1], [5, 5, 1]])
    )
    assert sizes == [2, 1]
    assert loss == pytest.approx((0.1 + 0.0) / 2)
    theta = torch.tensor([[1.0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [-1, 0, 0, 0, 1]])
    gates = _gaussian_moe.log_gates(theta, torch.tensor([0.5]), 2).exp()
    assert gates[0, 2] == 0
    assert torch.allclose(gates[0, :2], torch.tensor([0.5, 0.0]).softmax(0))


def test_splits_and_calibration_are_what_they_say():
    topology = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.1], [0.1, 0.1, 1.0]])
    expert, task = torch.tensor([[0], [1], [2]]), torch.tensor([0, 2, 1])
    assert cdsp_moe.EXPERTS == 8
    padded = torch.zeros(8, 8)
    padded[:3, :3] = topology
    assert cdsp_moe.split(padded, expert, task) == pytest.approx(0.5 - 0.1)
    right = torch.tensor([True, False, True, True])
    assert mofme_uar.calibration_error(torch.tensor([0.55, 0.55, 0.95, 0.95]), right) == pytest.approx(0.05)
    before = torch.tensor([[True, False, False]])
    after = torch.tensor([[False, True, False]])
    assert alf_lb_theory.moved_wrongly(before, after, torch.tensor([1.0, 0.0, 0.0])) == 1
    assert alf_lb_theory.moved_wrongly(before, after, torch.tensor([0.0, 1.0, 0.0])) == 0
