"""QMoE: without tokens it is rounding to {min, 0, max}; what it says of zeros and bits is so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.compress import method
from moekit.compress._sample import Sample, moe_output
from moekit.compress.qmoe import capped
from moekit.errors import OptionError
from moekit.formats import TernaryBank

NAME = "model.layers.0.mlp"


def test_without_tokens_it_is_rounding_to_nearest(model, profile) -> None:
    for layer in profile.layers.values():
        layer.sample_expert[layer.sample_expert == 2] = -1
    plan = method("qmoe").plan(profile, model)
    for name, layer in plan.layers.items():
        assert layer.values is not None
        made, plain = layer.values.bank(), TernaryBank.quantise(model.bank(name))
        assert torch.equal(made.expert(2).gate_up, plain.expert(2).gate_up)
        assert torch.equal(made.expert(2).down, plain.expert(2).down)
        assert "rounded to nearest because it got no inputs: 2" in layer.why


def test_weights_are_ternary_and_what_is_said_of_them_is_so(model, profile) -> None:
    layer = method("qmoe").plan(profile, model).layers[NAME]
    assert layer.values is not None
    bank = layer.values.bank()
    weights = [w for e in range(8) for w in (bank.expert(e).gate_up, bank.expert(e).down)]
    for row in (row for weight in weights for row in weight):
        assert len(row[row != 0].unique()) <= 2
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    bits = 8 * sum(t.nbytes for t in bank.tensors().values()) / sum(w.numel() for w in weights)
    assert f"{zeros:.1%} of the weights zero, {bits:.2f} bits each" in layer.why


def test_feedback_lowers_the_error_on_the_sample(model, profile) -> None:
    layer = profile.layers[NAME]
    mix = np.random.default_rng(0).normal(size=(3, 6))
    layer.hidden[:] = layer.hidden[:, :3] @ mix + 0.1 * layer.hidden
    sample, dense = Sample.of(layer), model.bank(NAME)
    made = method("qmoe").plan(profile, model).layers[NAME].values.bank()
    wanted = moe_output(sample, dense)
    ours, plain = (
        float((moe_output(sample, bank.dequantise()) - wanted).square().sum())
        for bank in (made, TernaryBank.quantise(dense))
    )
    assert ours < plain


def test_no_expert_has_more_than_its_share_of_tokens(profile) -> None:
    layer = profile.layers[NAME]
    layer.sample_expert[:, 0], layer.sample_expert[:, 1] = 0, 1 + np.arange(50) % 7
    sample = Sample.of(layer)
    assert sample.count_E[0] == 50
    kept = capped(sample, 2.0)  # of 100 slots each of 8 experts has 12.5 on average
    assert kept.count_E.tolist() == [25, *sample.count_E[1:].tolist()]
    assert torch.equal(kept.own(0).token_N, torch.arange(25))
    assert torch.equal(kept.own(3).weight_N, sample.own(3).weight_N)
    assert sample.count_E[0] == 50
    assert capped(sample, 4.0).count_E.tolist() == sample.count_E.tolist()


@pytest.mark.parametrize("bad", ["damping=-1", "damping=nan", "most=0", "most=nan"])
def test_what_is_refused(bad: str) -> None:
    with pytest.raises(OptionError, match=f"qmoe: {bad}"):
        method(f"qmoe:{bad}")
