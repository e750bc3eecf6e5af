"""Super experts: planted ones are found, every method leaves them alone, the probe silences, and sinks are measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._protect import around, even
from moekit.compress.super_experts import Sinks, silenced, sinks
from moekit.errors import OptionError, PlanError, TextError
from moekit.formats import DenseBank, PackedBank
from moekit.plan import LayerPlan, make_plan, values
from moekit.plan.planner import LayerPlanner, Site
from moekit.plan.recombine import recombined
from moekit.stream import LoadedModel

NAME, OTHER = "model.layers.0.mlp", "model.layers.1.mlp"
PLANTED = 5


@pytest.fixture
def planted(model, profile):
    """Expert 5 of the first layer returns a hundred times what any other does, and is what every score drops first."""
    layer = profile.layers[NAME]
    layer.max_abs_down[PLANTED] = 100.0
    for name in ("counts", "gate_norm", "probability", "contribution", "selected_probability", "strong_logit"):
        layer.arrays[name][..., PLANTED] = 0.01
    layers = {name: replace(one, layer=i) for i, (name, one) in enumerate(profile.layers.items())}
    return model, replace(profile, layers=layers)


def loss(plan) -> float:
    return float(sum(layer.matrix()[:, :3].sum() for layer in plan.layers.values())) / 99


def test_exactly_the_planted_one_is_named_and_nothing_changes(planted) -> None:
    model, profile = planted
    plan = method("super-experts").plan(profile, model)
    assert [plan.layers[name].why for name in (NAME, OTHER)] == [f"super experts: {PLANTED}", "no super expert"]
    assert plan.untouched
    profile.layers[NAME].max_abs_down[:] = profile.layers[OTHER].max_abs_down[:] = 3.0
    assert {layer.why for layer in method("super-experts").plan(profile, model).layers.values()} == {"no super expert"}


PRUNING = ("random", "frequency", "router-probability", "reap", "easy-ep", "premoe")


@pytest.mark.parametrize("name", [*PRUNING, "rtn", "average", "m-smoe", "dern", "eep"])
def test_every_method_leaves_it_alone(name: str, planted) -> None:
    model, profile = planted
    options = ":evaluations=8" if name == "eep" else ""
    guarded = method(f"super-experts:planner={name}{options}")
    assert method(guarded.spec) == guarded
    plan = guarded.plan(profile, model, loss)
    assert plan == guarded.plan(profile, model, loss)
    layer, plain = plan.layers[NAME], method(name + options).plan(profile, model, loss)
    assert layer.plain_slots == plain.layers[NAME].plain_slots or name == "m-smoe"
    ours = [e for e in layer.experts if any(source == PLANTED for source, _ in e.parts)]
    assert len(ours) == 1
    assert ours[0].untouched
    row = [slot for slot, row in zip(layer.slots, layer.rows, strict=True) if row == ((PLANTED, 1.0),)]
    assert row == [layer.experts.index(ours[0])]
    made, source = recombined(model.banks[NAME], layer), model.banks[NAME]
    assert torch.equal(made.down[row[0]], source.down[PLANTED])
    assert torch.equal(made.gate_up[row[0]], source.gate_up[PLANTED])
    if name != "m-smoe":  # whose budget is one of all layers
        assert len(layer.experts) == len(plain.layers[NAME].experts)
    assert replace(plan.layers[OTHER], why="", values=None) == replace(plain.layers[OTHER], why="", values=None) or (
        name in ("m-smoe", "eep")
    )
    assert f"protects {PLANTED}" in layer.why


def test_without_protection_pruning_drops_it(planted) -> None:
    model, profile = planted
    assert PLANTED in method("frequency:keep=4").plan(profile, model).layers[NAME].dropped
    ours = method("super-experts:planner=frequency:keep=4;domains=code").plan(profile, model).layers[NAME]
    code = method("frequency:keep=3,domains=code").plan(profile, model).layers[NAME]
    assert ours.sources == code.sources | {PLANTED}


def test_protection_works_in_a_sequence(planted) -> None:
    model, profile = planted
    specs = ("super-experts:planner=frequency:keep=5", "super-experts:planner=rtn:bits=4")
    layer = make_plan([method(spec) for spec in specs], model, profile).layers[NAME]
    assert sorted((e.parts[0][0] == PLANTED, e.bits) for e in layer.experts) == [(False, 4)] * 4 + [(True, 16)]


class Computed(LayerPlanner):
    """Doubles every expert, as values of a format."""

    spec = "computed"  # type: ignore[assignment]

    def __init__(self, pack: bool) -> None:
        self.pack = pack

    def plan_layer(self, layer, bank, site) -> LayerPlan:
        twice = DenseBank(2 * bank().gate_up, bank().down)
        made = PackedBank.quantise(twice, 8, 2) if self.pack else twice
        return LayerPlan.keep([0, 3, 5], site.num_experts).valued(values.keep(made.select([0, 3, 5])))


@pytest.mark.parametrize("pack", [False, True])
def test_computed_values_lie_beside_the_protected(planted, pack: bool) -> None:
    model, _ = planted
    model.sites = model.sites[:1]
    layer = around(Computed(pack), {NAME: (1, 5)}, None, model)[NAME]
    # Without 1 and 5, numbers 0, 3 and 5 of the others are the experts 0, 4 and 7.
    assert [e.parts[0][0] for e in layer.experts] == [0, 1, 4, 5, 7]
    made, source = recombined(model.banks[NAME], layer), model.banks[NAME]
    assert torch.equal(made.gate_up[[1, 3]], source.gate_up[[1, 5]])
    assert torch.allclose(made.gate_up[[0, 2, 4]], 2 * source.gate_up[[0, 4, 7]], atol=0.1)


def test_groups_lose_no_balance(model, profile, observe) -> None:
    site = Site(NAME, 16, 2, groups=(4, 2))
    assert even([1, 2, 9], np.arange(16.0).tolist(), site) == (1, 2, 6, 7, 9, 11, 14, 15)
    assert even([], np.arange(16.0).tolist(), site) == ()
    assert even([3, 1], np.arange(8.0).tolist(), Site(NAME, 8, 2)) == (1, 3)
    model.sites = [site]
    layer = observe(experts=16)
    layer.max_abs_down[9] = 50.0
    profile = replace(profile, layers={NAME: layer})
    plan = method("super-experts:planner=frequency:keep=12").plan(profile, model).layers[NAME]
    assert 9 in plan.sources
    assert [sum(e // 4 == g for e in plan.sources) for g in range(4)] == [3, 3, 3, 3]
    with pytest.raises(PlanError, match=r"4 of 16 experts are protected, .* keep 12 or more"):
        method("super-experts:planner=frequency:keep=8").plan(profile, model)


def test_what_cannot_be_protected_is_one_clear_line(planted) -> None:
    model, profile = planted
    with pytest.raises(PlanError, match=r"3 of 8 experts are protected, which leaves reap:keep=3 too few .* keep 4"):
        around(method("reap:keep=3"), {NAME: (1, 2, 3)}, profile, model)
    with pytest.raises(OptionError, match="unknown method 'reapp'; did you mean 'reap'"):
        method("super-experts:planner=reapp")
    for bad in ("percentile=101.0", "depth=1.5", "ratio=-0.1"):
        with pytest.raises(OptionError, match=f"super-experts: {bad} must lie between 0 and"):
            method(f"super-experts:{bad}")


def test_the_probe_returns_zeros_and_nothing_else_changes(model) -> None:
    plan = silenced(model, {NAME: [PLANTED]})
    made, source = recombined(model.banks[NAME], plan.layers[NAME]), model.banks[NAME]
    assert not made.down[PLANTED].any()
    others = [e for e in range(8) if e != PLANTED]
    assert torch.equal(made.down[others], source.down[others])
    assert plan.layers[NAME].routes_alike
    assert list(plan.layers) == [NAME]
    with pytest.raises(OptionError, match="has no expert 8: it has 0 to 7"):
        silenced(model, {NAME: [8]})


def test_sinks_of_a_model_whose_attention_is_known() -> None:
    runner = LoadedModel.load(Checkpoint.open("moekit:mini"), dtype=torch.float32)
    ids = np.arange(60, 100)
    usual = runner.model.config._attn_implementation
    seen = sinks(runner, [ids, ids + 7])
    assert runner.model.config._attn_implementation == usual
    assert len(seen.mass) == len(seen.massive) == runner.model.config.num_hidden_layers
    # Zeroed queries attend to all they see alike: token i gives 1 / (i + 1) to the first.
    with torch.no_grad():
        for layer in runner.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.input_layernorm.weight.zero_()
    flat = sinks(runner, [ids])
    assert np.allclose(flat.mass, np.mean([1 / (i + 1) for i in range(1, 40)]), atol=1e-6)
    assert seen.decay(seen) == 0.0
    assert Sinks(np.array([0.5]), seen.massive).decay(Sinks(np.array([0.1]), seen.massive)) == pytest.approx(0.8)
    with pytest.raises(TextError, match="two tokens or more"):
        sinks(runner, [ids[:1]])
