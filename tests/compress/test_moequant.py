"""MoEQuant: with every affinity 1 it is GPTQ; with others it serves the tokens that count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moekit.compress import method
from moekit.compress._calibrated import Feedback, packed
from moekit.compress._sample import Sample, output
from moekit.errors import OptionError, ProfileError
from moekit.formats import DenseBank
from moekit.profile.layer import LayerProfile


def test_equal_affinities_are_gptq(model, profile) -> None:
    for layer in profile.layers.values():
        layer.sample_weight[:] = 1.0
    ours, plain = (method(f"{name}:bits=3,group_size=4").plan(profile, model) for name in ("moequant", "gptq"))
    assert [layer.values for layer in ours.layers.values()] == [layer.values for layer in plain.layers.values()]
    for layer in profile.layers.values():
        layer.sample_weight[:] = np.random.default_rng(1).random(layer.sample_weight.shape) + 0.01
    other = method("moequant:bits=3,group_size=4").plan(profile, model)
    assert [layer.values for layer in other.layers.values()] != [layer.values for layer in plain.layers.values()]
    without = method("moequant:bits=3,group_size=4,affinity=false").plan(profile, model)
    assert [layer.values for layer in without.layers.values()] == [layer.values for layer in plain.layers.values()]


def test_the_scale_of_affinities_does_not_matter(model, profile) -> None:
    first = method("moequant:bits=3").plan(profile, model)
    for layer in profile.layers.values():
        layer.sample_weight[:] *= 0.25
    again = method("moequant:bits=3").plan(profile, model)
    assert [layer.values for layer in first.layers.values()] == [layer.values for layer in again.layers.values()]


def test_tokens_that_count_more_are_served_better() -> None:
    """Half of the tokens, which lie in one subspace, have nearly all of the weight."""
    g = torch.Generator().manual_seed(0)
    draw = np.random.default_rng(0)
    bank = DenseBank(torch.randn(1, 32, 24, generator=g), torch.randn(1, 24, 16, generator=g))
    heavy, light = (draw.normal(size=(200, 6)) @ draw.normal(size=(6, 24)) for _ in range(2))
    hidden = np.concatenate([heavy, light]).astype(np.float32)
    arrays = {
        "hidden": hidden,
        "sample_expert": np.zeros((400, 1), np.int32),
        "sample_weight": np.repeat([[1.0], [0.001]], 200, axis=0).astype(np.float32),
        "sample_domain": np.zeros(400, np.int32),
    }
    sample = Sample.of(LayerProfile("layer", 0, 1, 1, ("all",), arrays))
    wanted = output(bank.expert(0), bank.activation, sample.x_SH)
    error = {}
    for weighted in (False, True):
        made, _ = packed(sample, bank, 2, 24, feedback=Feedback(weighted=weighted))
        off = output(made.expert(0), bank.activation, sample.x_SH) - wanted
        error[weighted] = [float(part.square().sum()) for part in off.split(200)]
    assert error[True][0] < error[False][0]
    assert error[True][1] > error[False][1]


def test_the_text_to_calibrate_on_is_chosen_by_domain(model, profile) -> None:
    code = method("moequant:domains=code").plan(profile, model)
    both = method("moequant").plan(profile, model)
    assert code.layers["model.layers.0.mlp"].values != both.layers["model.layers.0.mlp"].values
    assert "on 25 sampled tokens" in code.layers["model.layers.0.mlp"].why
    with pytest.raises(ProfileError, match="the profile has no domain 'self'"):
        method("moequant:domains=self").plan(profile, model)


def test_what_is_refused(model, profile) -> None:
    with pytest.raises(OptionError, match="moequant: bits=6 is a precision no format has"):
        method("moequant:bits=6")
    rows = ("hidden", "sample_expert", "sample_weight", "sample_domain")
    empty = {
        name: replace(layer, arrays={**layer.arrays, **{row: layer.arrays[row][:0] for row in rows}})
        for name, layer in profile.layers.items()
    }
    with pytest.raises(ProfileError, match="has no sampled tokens to work with: profile again with more"):
        method("moequant").plan(replace(profile, layers=empty), model)
