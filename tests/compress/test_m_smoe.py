"""M-SMoE: lossless merges of permuted copies with alignment and not without; the paper's budget and grouping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.compress import method
from moekit.compress._routed import dominant
from moekit.formats import DenseBank
from moekit.plan.merge import merged
from moekit.plan.recombine import recombined

NAME = "model.layers.0.mlp"


def outputs(bank: DenseBank, x_TH: torch.Tensor) -> torch.Tensor:
    experts = (bank.expert(e) for e in range(bank.num_experts))
    return torch.stack([bank.activation(x_TH @ w.gate_up.T) @ w.down.T for w in experts])


@pytest.mark.parametrize("aligned", [True, False])
def test_permuted_copies_merge_losslessly_only_when_aligned(model, profile, aligned: bool) -> None:
    """Experts 4 to 7 are reordered copies of 0 to 3, and each copy routes like its original."""
    first = model.banks[NAME].select([0, 1, 2, 3])
    half = DenseBank(first.gate_up.double(), first.down.double())
    turned = half.permute(torch.stack([torch.tensor([2, 0, 3, 1])] * 4))
    model.banks[NAME] = DenseBank(torch.cat([half.gate_up, turned.gate_up]), torch.cat([half.down, turned.down]))
    profile.layers[NAME].counts[:] = [9, 9, 9, 9, 1, 2, 1, 2]
    profile.layers[NAME].logit_gram[:] = np.tile(np.eye(4), (2, 2))
    model.sites = model.sites[:1]
    plan = method(f"m-smoe:keep=5,aligned={aligned}").plan(profile, model)
    layer = plan.layers[NAME]
    assert layer.slots == (0, 1, 2, 3, 0, 1, 2, 3)
    assert len(layer.rows) == 8
    x_TH = torch.randn(9, 6, dtype=torch.float64)
    error = outputs(recombined(model.banks[NAME], layer), x_TH) - outputs(half, x_TH)
    assert bool(error.abs().max() < 1e-12) is aligned


def test_usage_weights_and_unused_members() -> None:
    layer = merged(np.array([0, 0, 0, 3, 3]), np.array([0.6, 0.2, 0.0, 0.0, 0.0]), None, "why")
    assert [source for source, _ in layer.experts[0].parts] == [0, 1]
    assert [weight for _, weight in layer.experts[0].parts] == pytest.approx([0.75, 0.25])
    assert layer.experts[1].parts == ((3, 0.5), (4, 0.5))
    assert layer.slots == (0, 0, 0, 1, 1)
    assert layer.dropped == (2,)


def test_the_budget_is_global_and_strict() -> None:
    usage = {"a": np.array([0.4, 0.35, 0.25]), "b": np.array([0.9, 0.06, 0.04])}
    assert dominant(usage, 4) == {"a": [0, 1], "b": [0]}
    assert dominant(usage, 5) == {"a": [0, 1, 2], "b": [0]}
    assert dominant(usage, 6) == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert dominant(usage, 2) == {"a": [0], "b": [0]}
    assert dominant({"a": np.full(4, 0.25)}, 3) == {"a": [0]}
