"""DERN: copies of kept experts change nothing, halves find their owners, and alpha above 1 is plain pruning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekit.compress import method
from moekit.errors import OptionError
from moekit.formats import DenseBank
from moekit.plan import make_plan
from moekit.plan.recombine import recombined

NAME = "model.layers.0.mlp"


def turned(bank: DenseBank, order: list[int]) -> DenseBank:
    return bank.permute(torch.tensor([order] * bank.num_experts))


def joined(*banks: DenseBank) -> DenseBank:
    return DenseBank(torch.cat([b.gate_up for b in banks]), torch.cat([b.down for b in banks]))


@pytest.fixture
def one(model, profile):
    """One layer whose first four experts are the ones to keep."""
    model.sites = model.sites[:1]
    profile.layers[NAME].selected_probability[:] = [9, 8, 7, 6, 4, 3, 2, 1]
    return model, replace(profile, layers={NAME: profile.layers[NAME]})


def same(a: DenseBank, b: DenseBank) -> bool:
    return torch.equal(a.gate_up, b.gate_up) and torch.equal(a.down, b.down)


def test_dropped_copies_leave_kept_experts_bit_for_bit(one) -> None:
    model, profile = one
    first = model.banks[NAME].select([0, 1, 2, 3])
    model.banks[NAME] = joined(first, turned(first, [2, 0, 3, 1]))
    layer = method("dern:keep=4").plan(profile, model).layers[NAME]
    assert same(recombined(model.banks[NAME], layer), first)
    assert [e.parts for e in layer.experts] == [((e, 1.0), (e + 4, 1.0)) for e in range(4)]
    assert layer.dropped == ()
    profile.layers[NAME].logit_gram[:] = torch.eye(4).tile(2, 2).numpy()
    naive = method("m-smoe:keep=4,aligned=false").plan(profile, model).layers[NAME]
    assert not torch.allclose(recombined(model.banks[NAME], naive).down[0], first.down[0], atol=1e-3)


def test_a_copy_with_the_sign_of_up_and_down_turned_needs_canonical(one) -> None:
    """The same function; seen as opposite neurons, which the other neurons of the layer then beat."""
    model, profile = one
    first = model.banks[NAME].select([0, 1, 2, 3])
    gate, up = first.gate_up.chunk(2, dim=1)
    model.banks[NAME] = joined(first, DenseBank(torch.cat([gate, -up], dim=1), -first.down))
    for spec, lossless in (("dern:keep=4,canonical=true", True), ("dern:keep=4,alpha=-1.0", False)):
        layer = method(spec).plan(profile, model).layers[NAME]
        assert same(recombined(model.banks[NAME], layer), first) is lossless


@pytest.mark.parametrize("likeness", ["joined", "mean"])
def test_each_half_of_a_mixed_expert_goes_to_its_owner(one, likeness: str) -> None:
    model, profile = one
    bank = model.banks[NAME]
    inner = bank.intermediate_size
    half = torch.arange(2 * inner) % inner < inner // 2
    gate_up = torch.where(half[:, None], bank.gate_up[0], bank.gate_up[1])
    down = torch.where(half[:inner], bank.down[0], bank.down[1])
    model.banks[NAME] = joined(bank.select([0, 1]), DenseBank(gate_up[None], down[None]))
    model.sites = [replace(model.sites[0], num_experts=3)]
    profile.layers[NAME].arrays["selected_probability"] = profile.layers[NAME].selected_probability[..., :3]
    layer = method(f"dern:keep=2,likeness={likeness}").plan(profile, model).layers[NAME]
    assert [e.parts for e in layer.experts] == [((0, 1.0), (2, 0.5)), ((1, 1.0), (2, 0.5))]
    assert same(recombined(model.banks[NAME], layer), bank.select([0, 1]))


def test_alpha_above_one_is_plain_pruning(one) -> None:
    model, profile = one
    plan = method("dern:keep=4,alpha=1.01").plan(profile, model).layers[NAME]
    assert plan == type(plan).keep([0, 1, 2, 3], 8, why=plan.why)
    far = method("dern:keep=4,alpha=0.999").plan(profile, model).layers[NAME]
    assert replace(far, why="") == replace(plan, why="")
    assert far.why.endswith("no neuron of the others is like a kept one at 0.999")
    whole = method("dern:keep=8").plan(profile, model).layers[NAME]
    assert whole.untouched


def test_merged_neurons_are_weighted_means(one) -> None:
    """Every neuron of one dropped expert joins the same kept neuron: its pool is their weighted mean."""
    model, profile = one
    unit = torch.nn.functional.normalize(torch.randn(18, generator=torch.Generator().manual_seed(1)), dim=0)
    rows = {0: unit, 1: -unit, 2: 2.0 * unit}
    bank = DenseBank(
        torch.stack([torch.cat([r[:6].tile(2, 1), r[6:12].tile(2, 1)]) for r in rows.values()]),
        torch.stack([r[12:, None].tile(1, 2) for r in rows.values()]),
    )
    model.banks[NAME], model.sites = bank, [replace(model.sites[0], num_experts=3)]
    profile.layers[NAME].arrays["selected_probability"] = profile.layers[NAME].selected_probability[..., :3]
    profile.layers[NAME].selected_probability[:] = [6.0, 5.0, 1.0]
    layer = method("dern:keep=2").plan(profile, model).layers[NAME]
    made = recombined(bank, layer)
    assert torch.allclose(made.down[0, :, 0], (6 * unit[12:] + 2 * 1 * 2.0 * unit[12:]) / 8)
    assert torch.equal(made.down[0, :, 1], unit[12:])
    assert torch.equal(made.down[1], bank.down[1])


def test_frequency_keeps_what_frequency_keeps(model, profile) -> None:
    for name in model.banks:
        ours = method("dern:keep=3,score=frequency,alpha=2").plan(profile, model).layers[name]
        assert ours.sources == method("frequency:keep=3").plan(profile, model).layers[name].sources


def test_rounding_after_recombining_is_one_plan(one) -> None:
    model, profile = one
    plan = make_plan([method("dern:keep=4,alpha=-1.0"), method("rtn:bits=4,group_size=2")], model, profile).layers[NAME]
    assert plan.values is not None
    assert {e.bits for e in plan.experts} == {4}


def test_alpha_below_every_cosine_is_refused() -> None:
    for bad in ("-1.5", "nan"):
        with pytest.raises(OptionError, match=f"alpha={bad} is below every cosine"):
            method(f"dern:alpha={bad}")
