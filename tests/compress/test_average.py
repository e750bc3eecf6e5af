"""Averaging random groups: every expert lives on in one mean, sizes differ by one at most, usage weighs."""

from __future__ import annotations

import pytest
import torch

from moekit.compress import method
from moekit.errors import OptionError, PlanError
from moekit.plan.recombine import recombined

NAME = "model.layers.0.mlp"


def test_groups_are_even_and_hold_everyone(model, profile) -> None:
    layer = method("average:keep=3").plan(profile, model).layers[NAME]
    sizes = sorted(layer.slots.count(slot) for slot in range(3))
    assert sizes == [2, 3, 3]
    assert len(layer.rows) == 8
    assert method("average:keep=8").plan(profile, model).layers[NAME].plain_slots


def test_the_mean_is_weighted_by_usage_or_not(model, profile) -> None:
    count = profile.layers[NAME].total("counts")
    bank = model.banks[NAME]
    for spec, weight in (("usage", count), ("uniform", count * 0 + 1)):
        layer = method(f"average:keep=2,weights={spec}").plan(profile, model).layers[NAME]
        made = recombined(bank, layer)
        for slot in range(2):
            members = [e for e in range(8) if layer.slots[e] == slot]
            share = torch.from_numpy(weight[members] / weight[members].sum()).float()
            assert torch.allclose(made.down[slot], torch.einsum("e,ehi->hi", share, bank.down[members]), atol=1e-5)


def test_draws_differ_by_seed_and_layer_and_repeat(model, profile) -> None:
    plans = [method(f"average:seed={seed}").plan(profile, model) for seed in range(6)]
    assert len({plan.layers[NAME].slots for plan in plans}) > 1
    assert any(plan.layers[NAME].slots != plan.layers["model.layers.1.mlp"].slots for plan in plans)
    assert plans[3] == method("average:seed=3").plan(profile, model)


def test_impossible_counts_are_refused(model, profile) -> None:
    with pytest.raises(OptionError, match="keep=0"):
        method("average:keep=0")
    with pytest.raises(PlanError, match="it has only 8 experts"):
        method("average:keep=9").plan(profile, model)
