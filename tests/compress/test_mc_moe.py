"""MC-MoE: the widths are those no other choice beats, every factor counts, and thresholds are the sample's medians."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from moekit.compress import method
from moekit.compress._bits import WIDTHS, importance, losses, rounded
from moekit.compress._sample import Sample, moe_output
from moekit.compress._skip import protected_norm, ratio_skip, renormalises, tail_ratio
from moekit.contract import Routing
from moekit.errors import OptionError
from moekit.formats import DenseBank, PackedBank
from moekit.plan.rewriting import rewrite_of

NAME = "model.layers.0.mlp"


def widths(plan) -> tuple[int, ...]:
    return plan.layers[NAME].values.bank().bits


def test_no_other_widths_lose_less(model, profile) -> None:
    layer, bank = profile.layers[NAME], model.banks[NAME]
    sample = Sample.of(layer)
    banks, _ = rounded(sample, bank, 64)
    loss_EB = importance(layer, (1.0, 1.5))[:, None] * losses(sample, bank, banks) ** 2

    def lost(choice) -> float:
        return sum(loss_EB[e, WIDTHS.index(width)] for e, width in enumerate(choice))

    chosen = widths(method("mc-moe:bits=2").plan(profile, model))
    sane = [c for c in itertools.product(WIDTHS, repeat=8) if sum(c) == 16 and 3 in c and 2 in c]
    assert chosen == min(sane, key=lost)
    assert len(set(chosen)) > 1


def test_the_layer_is_what_its_experts_are_at_their_widths(model, profile) -> None:
    made = method("mc-moe:bits=2").plan(profile, model).layers[NAME].values.bank()
    banks, _ = rounded(Sample.of(profile.layers[NAME]), model.banks[NAME], 64)
    for e, width in enumerate(made.bits):
        assert torch.equal(made.expert(e).gate_up, banks[WIDTHS.index(width)].expert(e).gate_up)
    ones = banks[0].expert(3).gate_up
    assert torch.equal(ones.abs(), ones.abs()[:, :1].expand_as(ones))


def test_eps_is_the_change_of_the_layer_with_one_expert_rounded(model, profile) -> None:
    sample, bank = Sample.of(profile.layers[NAME]), model.banks[NAME]
    banks, _ = rounded(sample, bank, 64)
    found = losses(sample, bank, banks)
    for e, b in ((0, 0), (5, 2)):
        experts = [(banks[b] if i == e else bank).expert(i) for i in range(8)]
        change = moe_output(sample, DenseBank.stack(experts, bank.activation)) - moe_output(sample, bank)
        assert found[e, b] == pytest.approx(float(change.norm()), rel=1e-4)
    assert (found[:, 0] > found[:, 2]).all()


@pytest.mark.parametrize("factor", ["counts", "selected_probability", "weights"])
def test_every_factor_widens_the_expert_it_speaks_for(factor: str, model, profile) -> None:
    layer = profile.layers[NAME]
    for name in ("counts", "selected_probability"):
        layer.arrays[name][:] = 10.0
    if factor != "weights":
        layer.arrays[factor][..., 4] = 1e4
    else:
        layer.sample_weight[:] = np.where(layer.sample_expert == 4, 1e3, 1.0)
    alone = {"counts": "beta=0,gamma=0.01", "selected_probability": "alpha=0,gamma=0.01", "weights": "alpha=0,beta=0"}
    assert widths(method(f"mc-moe:bits=1.5,{alone[factor]}").plan(profile, model))[4] == 3


def test_the_average_is_spent(model, profile) -> None:
    for bits, spent in ((1.375, 11), (2.0, 16), (2.49, 19), (3.0, 23)):
        assert sum(widths(method(f"mc-moe:bits={bits}").plan(profile, model))) == spent


def sample(slots: int, tokens: int = 200) -> Sample:
    draw = np.random.default_rng(0)
    routing = torch.from_numpy(draw.random((tokens, slots))).float()
    expert = torch.from_numpy(draw.random((tokens, 8)).argsort(1)[:, :slots])
    x_SH = torch.from_numpy(draw.normal(size=(tokens, 6))).float()
    return Sample(x_SH, Routing(expert, routing / routing.sum(1, keepdim=True)), 8)


def test_half_of_the_tokens_stop_at_half_of_their_slots() -> None:
    two, four = sample(2), sample(4)
    weight = two.routing.weight
    assert tail_ratio(two, 0.5) == pytest.approx(float((weight.amin(1) / weight.amax(1)).quantile(0.5)))
    for seen in (two, four):
        skip = ratio_skip(seen, 0.5, 0.0)
        left = skip(seen.x_SH, seen.routing.expert, seen.routing.weight)[1] >= 0
        half = seen.routing.expert.shape[1] // 2
        assert float((left.sum(1) <= half).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert tail_ratio(sample(1), 0.5) == 0


def test_the_largest_inputs_are_protected() -> None:
    seen = sample(2)
    limit = protected_norm(seen, 0.1)
    assert int((seen.x_SH.abs().sum(1) >= limit).sum()) == 20
    assert protected_norm(seen, 0) is None


def test_weights_keep_their_sum_where_the_model_makes_them() -> None:
    seen = sample(4)
    assert renormalises(seen)
    loose = replace(seen.routing, weight=seen.routing.weight * torch.linspace(0.5, 1, 200)[:, None])
    assert not renormalises(replace(seen, routing=loose))
    assert not ratio_skip(replace(seen, routing=loose), 0.5, 0.0).renormalise


def test_skipping_is_planned_where_it_is_asked_for(model, profile) -> None:
    plain, skipping = (method(f"mc-moe:bits=2,skip={share}").plan(profile, model).layers[NAME] for share in (0.0, 0.5))
    assert plain.rewrite is None
    assert skipping.values == plain.values
    rewrite = rewrite_of(skipping, 6)
    assert rewrite is not None
    assert rewrite.describe()["ratio"] == pytest.approx(tail_ratio(Sample.of(profile.layers[NAME]), 0.5))
    assert "% run" in skipping.why
    assert isinstance(skipping.values.bank(), PackedBank)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mc-moe:bits=4", "mc-moe: bits=4.0 is the average of 1, 2 and 3 bits: give more than 1, at most 3"),
        ("mc-moe:bits=nan", "mc-moe: bits=nan is the average"),
        ("mc-moe:group_size=0", "mc-moe: group_size=0 must be positive"),
        ("mc-moe:skip=1.5", "mc-moe: skip=1.5 is a share of the tokens: give 0 to 1"),
        ("mc-moe:protect=-1", "mc-moe: protect=-1.0 is a share of the tokens: give 0 to 1"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(spec)


def test_too_few_bits_for_a_layer(model, profile) -> None:
    with pytest.raises(OptionError, match=r"leaves 8 experts 9 bits, .* has three and one two: give 1\.375 or more"):
        method("mc-moe:bits=1.2").plan(profile, model)


def test_importance_is_the_product_of_both_shares_with_their_exponents(profile) -> None:
    layer = profile.layers[NAME]
    phi, w = (layer.total(name) / layer.total(name).sum() for name in ("counts", "selected_probability"))
    np.testing.assert_allclose(importance(layer, (1.0, 1.5)), phi * w**1.5)
