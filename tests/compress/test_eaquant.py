"""EAQuant: scales moved into weights change no function, and everything that reads them is found or refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from checkpoint import miniatures
from moekit.bank import Activation
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._fold import Fold, find_fold
from moekit.compress._router_grid import RATIOS, aligned
from moekit.compress._sample import Sample, output
from moekit.compress._smoothing import input_scales, linear_in_up, scaled_inputs, scaled_units
from moekit.contract import Routing
from moekit.errors import OptionError, PlanError
from moekit.formats import DenseBank
from moekit.plan import LayerPlan, LiveLoss, Plan, apply, make_plan, values
from moekit.plan.live_streamed import StreamedLoss
from moekit.profile import profile
from moekit.stream import LoadedModel, StreamedModel
from plan.applying import logits, reload_here

STATISTICS = ("hidden", "sample_expert", "sample_weight", "sample_domain")
EXACT = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["moekit.plan.apply"], "reload_in_fresh_process", reload_here)


def source(folder: Path, family: str) -> Checkpoint:
    return Checkpoint.open(miniatures.plain(folder / family, family))


def folded(checkpoint: Checkpoint, change: Callable[[Fold], Fold] = lambda fold: fold) -> Plan:
    """Every layer's inputs scaled by random numbers, nothing rounded."""
    model, layers = checkpoint.skeleton(), {}
    for block in blocks(model):
        fold = change(find_fold(checkpoint, model, block))
        draw = torch.Generator().manual_seed(block.layer)
        edits, scale = fold.edits(checkpoint.read, torch.rand(block.hidden_size, generator=draw) + 0.5)
        bank = checkpoint.bank(block.name)
        grown = DenseBank(bank.gate_up * scale, bank.down, bank.gate_up_bias, bank.down_bias, bank.activation)
        layers[block.name] = LayerPlan.identity(block.num_experts).valued(values.keep(grown, edits))
    return Plan(source=checkpoint.fingerprint, layers=layers)


def output_of(folder: Path, family: str) -> torch.Tensor:
    _, inputs = families.build(family)
    return logits(AutoModelForCausalLM.from_pretrained(folder), inputs)


FOLDS = {
    "qwen3_moe": (False, 1),
    "qwen3_next": (True, 4),
    "deepseek_v3": (False, 3),
    "gpt_oss": (False, 1),
    "phimoe": (False, 1),
}
"""Whether norms scale by 1 + weight, and how many matrices read them besides the experts'."""


@pytest.mark.parametrize("family", FOLDS)
def test_a_fold_changes_no_logit(tmp_path: Path, family: str) -> None:
    """Plain and (1 + w) norms, a norm with a bias, shared experts and their gate, interleaved experts with biases."""
    checkpoint = source(tmp_path, family)
    model, inputs = families.build(family)
    plan = folded(checkpoint)
    apply(checkpoint, plan, tmp_path / "out")
    skeleton = checkpoint.skeleton()
    found = find_fold(checkpoint, skeleton, blocks(skeleton)[-1])
    assert (found.offset, len(found.readers)) == FOLDS[family]
    torch.testing.assert_close(output_of(tmp_path / "out", family), logits(model, inputs), **EXACT)
    norm = next(layer.values for layer in plan.layers.values()).edits[0]
    assert not torch.equal(Checkpoint.open(tmp_path / "out").read(norm), checkpoint.read(norm))


def test_a_forgotten_reader_changes_them(tmp_path: Path) -> None:
    checkpoint = source(tmp_path, "deepseek_v3")
    model, inputs = families.build("deepseek_v3")
    apply(checkpoint, folded(checkpoint, lambda fold: replace(fold, readers=fold.readers[:-1])), tmp_path / "out")
    assert not torch.allclose(output_of(tmp_path / "out", "deepseek_v3"), logits(model, inputs), **EXACT)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("cohere2_moe", "input_layernorm is read by self_attn as well"),
        ("flex_olmo", "they read no norm's output as it is"),
        ("jetmoe", "router and experts are one module"),
    ],
)
def test_what_cannot_be_folded_is_refused(tmp_path: Path, family: str, why: str) -> None:
    checkpoint = source(tmp_path, family)
    model = checkpoint.skeleton()
    with pytest.raises(PlanError, match=f"what its experts read cannot be scaled in the weights: {why}"):
        find_fold(checkpoint, model, blocks(model)[0])


def test_the_scales_are_those_the_norm_can_hold() -> None:
    stored = {"norm": torch.tensor([1.0, 0.3, 0.0, 2.0]).bfloat16(), "router": torch.ones(2, 4).bfloat16()}
    edits, scale = Fold(("norm",), ("router",), False).edits(stored.__getitem__, torch.tensor([3.0, 1.7, 5.0, 1.0]))
    assert torch.equal(edits["norm"].float() * scale, stored["norm"].float())
    assert torch.equal(edits["router"], scale.expand(2, 4).bfloat16())
    assert scale[2] == 1  # a channel that is silent stays as it is
    assert scale[0] != 3


def seen(checkpoint: Checkpoint, sample: int = 64):
    return profile(
        checkpoint, {"all": ["abc def ghij " * 40]}, sequence_length=64, sample=sample, held_out=0.0,
        statistics=STATISTICS,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_at_8_bits_the_model_stays_what_it_was(tmp_path: Path, family: str) -> None:
    checkpoint = source(tmp_path, family)
    model, inputs = families.build(family)
    plan = method("eaquant:bits=8,group_size=8").plan(seen(checkpoint), checkpoint)
    receipt = apply(checkpoint, plan, tmp_path / "out")
    assert receipt.job["format"] == "moekit"
    for layer in plan.layers.values():
        assert "inputs smoothed by" in layer.why
        assert "router at 8 bits of" in layer.why
        assert layer.values is not None
        assert {receipt.tensors[name]["became"] for name in layer.values.edits} == {"replaced"}
    before, after = logits(model, inputs), output_of(tmp_path / "out", family)
    assert (after - before).abs().mean() < 0.05 * before.std()


@pytest.mark.parametrize("streamed", [False, True])
def test_it_is_measured_live_with_all_it_replaces(tmp_path: Path, streamed: bool) -> None:
    checkpoint = source(tmp_path, "deepseek_v3")
    rows = [np.arange(3, 60), np.arange(30, 87)]
    if streamed:
        live = StreamedLoss(StreamedModel(checkpoint, dtype=torch.float32), checkpoint, rows)
    else:
        live = LiveLoss(LoadedModel.load(checkpoint, dtype=torch.float32), checkpoint, rows)
    whole = Plan(source=checkpoint.fingerprint, layers={})
    forgetful = folded(checkpoint, lambda fold: replace(fold, readers=fold.readers[1:]))
    assert live(folded(checkpoint)) < 1e-6
    assert live(forgetful) > 1e-4
    assert live(whole) < 1e-9


def test_it_works_on_what_earlier_methods_leave(tmp_path: Path) -> None:
    checkpoint = source(tmp_path, "qwen3_moe")
    found = profile(checkpoint, {"all": ["abc def ghij " * 40]}, sequence_length=64, held_out=0.0)
    plan = make_plan([method("frequency:keep=4"), method("eaquant:group_size=8")], checkpoint, found)
    apply(checkpoint, plan, tmp_path / "out")
    router = checkpoint.moe_layers[0].row_tensors[0].name
    assert Checkpoint.open(tmp_path / "out").tensors[router].shape[0] == 4
    assert torch.isfinite(output_of(tmp_path / "out", "qwen3_moe")).all()


def test_the_scale_may_be_the_router_s_own(tmp_path: Path) -> None:
    checkpoint = source(tmp_path, "qwen3_moe")
    found = seen(checkpoint)
    layer = checkpoint.moe_layers[0]
    sample, bank = Sample.of(found.layers[layer.name]), checkpoint.bank(layer.name)
    router = checkpoint.read(layer.row_tensors[0].name)
    own = input_scales(sample, bank.select([]), [router], 0.6)
    peak = sample.x_SH.abs().amax(0)
    torch.testing.assert_close(own, peak**0.6 / router.abs().amax(0) ** 0.4)
    every = input_scales(sample, bank, [router], 0.6)
    assert (every >= own).all()
    assert (every > own).any()
    plans = {how: method(f"eaquant:smooth={how}").plan(found, checkpoint) for how in ("all", "router", "none")}
    edited = {how: plan.layers[layer.name].values.edits for how, plan in plans.items()}
    assert [len(edited[how]) for how in ("all", "router", "none")] == [2, 2, 1]


def test_hidden_units_are_scaled_without_a_trace() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 48, 12), (2, 12, 24), (2, 48)]
    bank = DenseBank(*(torch.randn(*shape, generator=draw) for shape in shapes))
    bank.gate_up[0, 24 + 3] *= 100
    x = torch.randn(80, 12, generator=draw)
    sample = Sample(x, Routing(torch.zeros(80, 1, dtype=torch.long), torch.ones(80, 1)), 2)
    scaled, found = scaled_units(sample, bank, 0.7)
    assert found == 1
    assert not torch.equal(scaled.down[0], bank.down[0])
    assert torch.equal(scaled.down[1], bank.down[1])  # it has no tokens
    before, after = (output(b.expert(0), bank.activation, x) for b in (bank, scaled))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-4)
    divided, grown = scaled_inputs(sample, bank, torch.rand(12, generator=draw) + 0.5)
    torch.testing.assert_close(output(grown.expert(0), bank.activation, divided.x_SH), before, atol=1e-3, rtol=1e-4)


def test_hidden_units_that_are_not_proportional_to_up_stay() -> None:
    clipped = Activation("clipped", lambda z: z.chunk(2, -1)[0].sigmoid() * z.chunk(2, -1)[1].clamp(-7, 7))
    assert not linear_in_up(clipped)
    assert not linear_in_up(Activation("relu", torch.relu, gated=False))
    bank = DenseBank(torch.ones(1, 8, 4), torch.ones(1, 4, 4), activation=clipped)
    assert scaled_units(Sample.__new__(Sample), bank, 0.7) == (bank, 0)


def test_the_router_is_rounded_so_that_it_chooses_alike() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 24, generator=draw)
    x[:, 5] *= 0.01
    weight = torch.randn(8, 24, generator=draw)
    weight[:, 5] = 9.0  # an outlier that hardly matters stretches every row's range
    chosen = aligned(weight, x, 2, 4)
    assert chosen.ratio < 1
    assert 0 <= chosen.divergence < chosen.unshrunk
    assert all(len(row.unique()) <= 16 for row in chosen.weight)
    wanted = (x @ weight.T).topk(2).indices.sort().values

    def agreement(other: torch.Tensor) -> float:
        return float(((x @ other.T).topk(2).indices.sort().values == wanted).all(1).float().mean())

    low, high = weight.aminmax(dim=1, keepdim=True)
    plain = ((weight - low) / ((high - low) / 15)).round() * ((high - low) / 15) + low
    assert agreement(chosen.weight) > agreement(plain)


def test_a_router_that_is_on_the_grid_keeps_its_range() -> None:
    weight = torch.arange(16.0).repeat(4, 1) / 4 - 2
    chosen = aligned(weight, torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), 2, 4)
    assert chosen.ratio == RATIOS[0] == 1
    assert torch.equal(chosen.weight, weight)
    assert (RATIOS[-1], len(RATIOS)) == (0.35, 101)


def test_what_is_refused(model, profile) -> None:
    with pytest.raises(PlanError, match="this source has experts only; give smooth=none,router_bits=16"):
        method("eaquant").plan(profile, model)
    for bad, message in (
        ("bits=7", "bits=7 is a precision no format has"),
        ("alpha=1.5", "alpha=1.5 must lie between 0 and 1"),
        ("router_bits=12", "router_bits=12 is no width for a router"),
        ("smooth=some", "smooth=some is not all or router or none"),
    ):
        with pytest.raises(OptionError, match=message):
            method(f"eaquant:{bad}")


def test_experts_without_tokens_are_lent_all(model, profile) -> None:
    for layer in profile.layers.values():
        layer.sample_expert[layer.sample_expert == 2] = -1
    plan = method("eaquant:smooth=none,router_bits=16").plan(profile, model)
    assert "lent all tokens for want of their own: 2" in plan.layers["model.layers.0.mlp"].why
