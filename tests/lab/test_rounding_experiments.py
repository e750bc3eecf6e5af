"""Experiments on calibrated rounding: the rules decide from the figures, and what they measure is what they say."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moekit.bank import SILU_MUL
from moekit.formats import DenseBank, TernaryBank
from moekit.lab.experiments import eaquant, moequant, qmoe
from moekit.lab.experiments._rounding import imbalance, output_error
from moekit.plan import LayerPlan, Plan, values
from moekit.profile import Profile
from moekit.profile.layer import LayerProfile

NAME = "model.layers.0.mlp"


def runs(one: dict[str, dict[str, float]], noise: float = 1e-4) -> list[dict[str, dict[str, float]]]:
    """Three seeds that differ a little."""
    return [{kind: {n: v + noise * seed for n, v in named.items()} for kind, named in one.items()} for seed in range(3)]


def changed(one: Any, kind: str, name: str, value: float) -> list[dict[str, dict[str, float]]]:
    """As ``one``, but at one place the value, with noise of its own: a tie where it equals what it is compared with."""
    found = copy.deepcopy(one)
    for seed, run in enumerate(found):
        run[kind][name] = value + 1e-3 * (-1) ** seed
    return found


MOEQUANT = runs(
    {
        "imbalance": {"self": 0.01, "mixture": 0.03},
        "error": {"gptq mixture": 0.3, "affinity mixture": 0.2, "gptq self": 0.4, "affinity self": 0.3},
        "kl": {"gptq prose": 0.5, "gptq mixture": 0.2, "affinity mixture": 0.1, "affinity self": 0.3}
        | {"affinity noise": 1.0},
    }
)
QMOE = runs(
    {
        "kl": {"two": 0.1, "ternary": 0.2, "nearest": 0.9},
        "error": {"two": 0.1, "ternary": 0.2, "nearest": 0.5},
        "bits": {"two": 2.1, "ternary": 0.9, "nearest": 0.8},
    }
)
EAQUANT = runs(
    {
        "kl": {"none": 0.5, "router": 0.3, "all": 0.2},
        "choices": {"divergence": 0.9, "whole range": 0.8},
        "starved": {"plain": 0.3, "balanced": 0.2},
    }
)


@pytest.mark.parametrize(
    ("experiment", "good", "kind", "name", "value"),
    [
        (moequant, MOEQUANT, "imbalance", "self", 0.03),
        (moequant, MOEQUANT, "error", "affinity mixture", 0.3),
        (moequant, MOEQUANT, "kl", "affinity self", 0.5),
        (qmoe, QMOE, "kl", "two", 0.2),
        (qmoe, QMOE, "kl", "ternary", 0.9),
        (qmoe, QMOE, "error", "ternary", 0.5),
        (qmoe, QMOE, "bits", "ternary", 1.0),
        (eaquant, EAQUANT, "kl", "router", 0.5),
        (eaquant, EAQUANT, "kl", "all", 0.3),
        (eaquant, EAQUANT, "choices", "divergence", 0.8),
        (eaquant, EAQUANT, "starved", "balanced", 0.3),
    ],
)
def test_every_condition_of_a_rule_can_fail(experiment: Any, good: Any, kind: str, name: str, value: float) -> None:
    assert experiment.holds(experiment.summary(good))
    assert not experiment.holds(experiment.summary(changed(good, kind, name, value)))


class Source:
    def __init__(self, bank: DenseBank) -> None:
        self._bank = bank

    def bank(self, layer: str) -> DenseBank:
        return self._bank


@pytest.fixture
def bank() -> DenseBank:
    draw = torch.Generator().manual_seed(0)
    return DenseBank(torch.randn(4, 8, 6, generator=draw), torch.randn(4, 6, 4, generator=draw))


@pytest.fixture
def judge() -> Profile:
    draw = np.random.default_rng(0)
    arrays = {
        "hidden": draw.normal(size=(30, 6)).astype(np.float32),
        "sample_expert": draw.permuted(np.tile(np.arange(4), (30, 1)), axis=1)[:, :2].astype(np.int32),
        "sample_weight": draw.random((30, 2)).astype(np.float32),
        "sample_domain": np.zeros(30, np.int32),
        "counts": np.array([[[[30.0, 10.0, 10.0, 10.0]]]]),
    }
    layer = LayerProfile(NAME, 0, 4, 2, ("all",), arrays)
    return Profile("f" * 64, "a model", ("all",), {NAME: layer})


def plan_of(layer: LayerPlan) -> Plan:
    return Plan(source="f" * 64, layers={NAME: layer})


def test_the_output_error_is_relative_and_squared(bank: DenseBank, judge: Profile) -> None:
    whole = LayerPlan.identity(4)
    assert output_error(plan_of(whole), Source(bank), judge) == 0
    larger = replace(bank, down=bank.down * 1.5)
    assert output_error(plan_of(whole.valued(values.keep(larger))), Source(bank), judge) == pytest.approx(0.25)
    coarse, fine = (output_error(plan_of(whole.with_bits(bits, 8)), Source(bank), judge) for bits in (2, 8))
    assert 0 < fine < 0.01 * coarse


def test_imbalance_is_zero_where_use_is_even(judge: Profile) -> None:
    assert imbalance(judge) == pytest.approx(np.std([0.5, 1 / 6, 1 / 6, 1 / 6]))
    judge.layers[NAME].counts[:] = 7.0
    assert imbalance(judge) == 0


def test_rates_count_every_stored_byte(bank: DenseBank) -> None:
    made = TernaryBank.quantise(bank)
    bits, zeros = qmoe.rates(plan_of(LayerPlan.identity(4).valued(values.keep(made))))
    assert bits == pytest.approx(made.bits_per_weight())
    assert zeros == pytest.approx(made.zeros())
    wide = [qmoe.wide(columns) for columns in (64, 1024)]
    assert wide[0]["zeros"] < wide[1]["zeros"]
    assert wide[0]["bits"] > 1 > wide[1]["bits"]


def test_simulated_activations_have_16_values_a_token() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rounded = eaquant.even_steps(x)
    assert all(len(row.unique()) <= 16 for row in rounded)
    assert torch.equal(rounded.amin(1), x.amin(1))
    step = (x.amax(1) - x.amin(1)) / 15
    assert ((rounded - x).abs().amax(1) <= step * 0.501).all()
    assert torch.equal(eaquant.even_steps(torch.full((1, 4), 3.0)), torch.full((1, 4), 3.0))
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(eaquant.ROUNDED(z), eaquant.even_steps(SILU_MUL(z)))
