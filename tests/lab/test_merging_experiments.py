"""Merging and factoring experiments: their rules can fail, and what recovery trains is what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moekit.compress import method
from moekit.compress.mole_latent import train_latent, trained_bank
from moekit.formats import DenseBank, LatentBank
from moekit.lab.experiments import _recovering, m_smoe, mc_smoe, mole_latent, sub_moe, uncurl
from moekit.lab.experiments._recovering import hold_tied, read_tied, recovered
from moekit.lab.experiments._trial import Trial
from moekit.plan import LayerPlan, Permutation, Plan, StoredExpert
from moekit.plan.merge import merged


def gaps(names: tuple[str, ...], low: float) -> dict[str, Any]:
    return {name: {"gap": {"low": low, "mean": low + 1}} for name in names}


SVD = ("svd",)
GOOD = {
    sub_moe: {
        "merging": gaps((sub_moe.ROUTED, sub_moe.RANDOM), 0.1),
        "cut": {"rank 32": gaps(SVD, 0.1), "rank 16": gaps(SVD, 0.1)},
    },
    m_smoe: {"recovered": gaps((m_smoe.RANDOM, m_smoe.UNALIGNED, m_smoe.EQUAL), 0.1)},
    mc_smoe: {"recovered": gaps((mc_smoe.LOW, mc_smoe.MERGED), 0.1)},
    mole_latent: {
        **{f"groups of {group}": gaps(SVD, 0.1) for group in mole_latent.GROUPS},
        "excess of down": {"4": {"low": 0.1}, "16": {"low": 0.1}},
        "recovered": gaps(SVD, 0.1),
    },
    uncurl: {"tuned": gaps((uncurl.SCRATCH, uncurl.FREQUENCY), 0.1)},
}


def intervals(figures: dict[str, Any]) -> list[dict[str, float]]:
    if "low" in figures:
        return [figures]
    return [one for value in figures.values() for one in intervals(value)]


@pytest.mark.parametrize("experiment", GOOD, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_condition_of_a_rule_can_fail_it(experiment) -> None:
    figures = GOOD[experiment]
    assert experiment.holds(figures)
    for one in intervals(figures):
        before = dict(one)
        one.update(low=-0.1, **({"mean": -0.05} if "mean" in one else {}))
        assert not experiment.holds(figures)
        one.update(before)


def test_equal_weights_keep_groups_and_orders() -> None:
    order = np.array([1, 0])
    layer = merged(np.array([0, 0, 2]), np.array([3.0, 1.0, 1.0]), {1: order}, "why")
    equal = m_smoe.equal(layer)
    assert equal.slots == layer.slots
    assert equal.experts[0] == StoredExpert(((0, 0.5), (1, 0.5)), orders=(None, Permutation.of(order)))


def test_what_down_adds_is_held_against_half_of_the_rest() -> None:
    found = mole_latent.excess({"latent": [0.2, 0.4], "down too": [0.5, 0.9]})
    assert found["mean"] == pytest.approx((0.2 + 0.3) / 2)


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(domains=("arithmetic",), test=512)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recovering, "BYTES", 2048)


@pytest.mark.usefixtures("short")
def test_recovery_of_a_merge_is_the_same_plan_with_other_numbers(trial: Trial) -> None:
    layers = {}
    for layer in trial.source.moe_layers:
        leader_E = np.arange(layer.num_experts) // 2 * 2
        layers[layer.name] = merged(leader_E, np.ones(layer.num_experts), None, "pairs")
    plan = Plan(source=trial.source.fingerprint, layers=layers)
    before = {name: p.clone() for name, p in trial.runner.model.named_parameters()}
    after = recovered(trial, plan, 1, 4, hold_tied, read_tied)
    assert {name: (one.experts, one.slots) for name, one in after.layers.items()} == {
        name: (one.experts, one.slots) for name, one in layers.items()
    }
    bank = next(iter(after.layers.values())).values.bank()
    assert isinstance(bank, DenseBank)
    assert (bank.num_experts, bank.dtype) == (8, torch.bfloat16)
    assert trial.loss(after, 1) < trial.loss(plan, 1)
    assert all(torch.equal(p, before[name]) for name, p in trial.runner.model.named_parameters())


@pytest.mark.usefixtures("short")
def test_recovery_trains_every_contestant_on_the_same_rows(trial: Trial) -> None:
    first, second = (_recovering.text(trial, 3)(5)["input_ids"] for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape[0] == _recovering.ROWS
    assert not torch.equal(first, _recovering.text(trial, 4)(5)["input_ids"])


@pytest.mark.usefixtures("short")
def test_no_training_to_speak_of_changes_nothing_to_speak_of(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold, one step at a vanishing rate, read: the plan's own latent experts come back."""
    monkeypatch.setattr(_recovering, "RATE", 1e-12)
    plan = method("mole-latent:group=16").plan(None, trial.source)

    def hold(block, layer: LayerPlan) -> None:
        train_latent(block, [0] * 16, 64)

    after = recovered(trial, plan, 1, 1, hold, trained_bank)
    assert isinstance(next(iter(after.layers.values())).values.bank(), LatentBank)
    assert trial.loss(after, 1) == pytest.approx(trial.loss(plan, 1), rel=0.05)
    assert trial.nbytes(mole_latent.truncated(trial, 19)) >= trial.nbytes(plan)
