"""D2MoE: one set of planes serves every width, and heads widen the tokens that gain by it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import families
from moekit import lab
from moekit.blocks import blocks
from moekit.blocks.rewriting import attach
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._heads import fit_widths, mean_width
from moekit.compress._sample import Sample, moe_output
from moekit.compress.d2moe import planes
from moekit.contract import Routing
from moekit.errors import OptionError, PlanError
from moekit.formats import DenseBank, PackedBank
from moekit.kernels import BankExperts
from moekit.measure import compare
from moekit.plan import LiveLoss, values
from moekit.plan.rewriting import rewrite_of
from moekit.profile import profile as observe
from moekit.stream import LoadedModel

NAME = "model.layers.0.mlp"


def made(tokens: int = 600) -> tuple[Sample, DenseBank]:
    g = torch.Generator().manual_seed(0)
    bank = DenseBank(torch.randn(4, 16, 12, generator=g), torch.randn(4, 12, 8, generator=g))
    expert = torch.rand(tokens, 4, generator=g).argsort(1)[:, :2]
    weight = torch.rand(tokens, 2, generator=g)
    return Sample(torch.randn(tokens, 12, generator=g), Routing(expert, weight / weight.sum(1, keepdim=True)), 4), bank


def test_wider_is_closer_and_the_widths_share_their_bytes() -> None:
    sample, bank = made()
    nested, notes = planes(sample, bank, 5, 2, 6)
    wanted = moe_output(sample, bank)
    errors = [float((moe_output(sample, nested.at(width)) - wanted).norm()) for width in (2, 3, 4, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    apart = sum(PackedBank.quantise(bank, width, 6).nbytes for width in (2, 3, 4))
    assert nested.at(4).nbytes < apart
    assert notes.startswith("on 600 sampled tokens")
    two = nested.at(2).expert(1).gate_up
    again = planes(sample, bank, 2, 2, 6)[0]
    assert torch.equal(two, again.expert(1).gate_up)


def test_heads_widen_what_gains_by_it() -> None:
    sample, bank = made()
    nested, _ = planes(sample, bank, 4, 2, 6)
    free, few = fit_widths(sample, bank, nested, 0.0)
    assert few == ()
    assert mean_width(free, sample) > 3.9
    assert mean_width(fit_widths(sample, bank, nested, 1e6)[0], sample) == 2
    prices = [float(mean_width(fit_widths(sample, bank, nested, price)[0], sample)) for price in (0.0, 0.003, 0.01, 1)]
    assert prices == sorted(prices, reverse=True)
    assert len(set(prices)) > 2


def test_learned_widths_beat_drawn_ones_at_the_same_number_of_bits() -> None:
    sample, bank = made()
    sample = replace(sample, x_SH=sample.x_SH * torch.where(sample.x_SH[:, :1] > 0, 2.0, 0.3))
    nested, _ = planes(sample, bank, 4, 2, 6)
    head, _ = fit_widths(sample, bank, nested, 0.004)
    wanted, used = moe_output(sample, bank), sample.routing.expert
    chosen = head.choice(sample.x_SH, used)
    assert len(set(chosen.flatten().tolist())) > 1

    def error(at_SK: torch.Tensor) -> float:
        ids = Routing(used * 3 + at_SK, sample.routing.weight)
        return float((moe_output(replace(sample, routing=ids), head.runs(nested)) - wanted).square().sum())

    mixed = chosen.flatten()[torch.randperm(chosen.numel(), generator=torch.Generator().manual_seed(0))]
    assert error(chosen) < 0.8 * error(mixed.view_as(chosen))


def test_who_saw_too_little_runs_at_the_widest(model, profile) -> None:
    layer = profile.layers[NAME]
    layer.sample_expert[:] = np.where(layer.sample_expert == 5, 4, layer.sample_expert)
    plan = method("d2moe:price=1").plan(profile, model).layers[NAME]
    assert "too few tokens to tell: " in plan.why
    assert "a level rounded to nearest (no inputs, or no better): " in plan.why
    head = rewrite_of(plan, 6)
    assert (head.choice(torch.randn(9, 6), torch.full((9, 1), 5)) == 2).all()


def test_prices_and_planes_are_the_plan(model, profile) -> None:
    plain, priced = (method(f"d2moe:price={price}").plan(profile, model).layers[NAME] for price in (0, 0.01))
    assert plain.values == priced.values
    assert plain.rewrite is None
    assert priced.rewrite is not None
    assert priced.rewrite.describe["widths"] == [2, 3, 4]
    assert method("d2moe:bits=2").plan(profile, model).layers[NAME].rewrite is None


def test_what_is_measured_live_is_what_the_output_computes(tmp_path) -> None:
    built, _ = families.build("qwen3_moe")
    built.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(lab.mini()).save_pretrained(tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model")
    runner = LoadedModel.load(source, dtype=torch.float32)
    rows = [np.arange(3 + i, 43 + i) for i in range(4)]
    seen = observe(runner, {"all": rows}, held_out=0.0, sample=128, trace=0)
    plan = method("d2moe:bits=4,price=0.02").plan(seen, source)
    live = LiveLoss(runner, source, rows)
    measured, widest = live(plan), live(method("d2moe:price=0").plan(seen, source))
    assert measured > widest > 0
    live.restore()
    model = LoadedModel.load(source, dtype=torch.float32)
    for block in blocks(model.model):
        layer = plan.layers[block.name]
        own = BankExperts(layer.values.bank(), rewrite=rewrite_of(layer, block.hidden_size))
        model.model.get_submodule(block.name).experts = own.eval()
    batches = [{"input_ids": torch.from_numpy(row)[None]} for row in rows]
    assert measured == pytest.approx(compare(runner, model, batches).kl.mean, rel=1e-3)


def test_a_head_on_other_experts_is_refused(model, profile) -> None:
    plan = method("d2moe:price=0.01").plan(profile, model).layers[NAME]
    dense = replace(plan, values=values.keep(model.banks[NAME]))
    with pytest.raises(OptionError, match="need experts stored as nested planes, not as DenseBank"):
        rewrite_of(dense, 6).runs(dense.values.bank())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("d2moe:bits=1", "d2moe: planes from base=2 to bits=1 cannot be: a base has 1 to 4 bits, and bits lie"),
        ("d2moe:base=5,bits=8", "d2moe: planes from base=5 to bits=8 cannot be"),
        ("d2moe:group_size=0", "d2moe: group_size=0 must be positive"),
        ("d2moe:price=-1", r"d2moe: price=-1.0 must be at least 0 \(0 runs all at the widest\)"),
    ],
)
def test_impossible_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(spec)


def test_a_block_that_normalises_each_expert_is_not_measured_live() -> None:
    block = SimpleNamespace(num_experts=4, name="layer", experts=SimpleNamespace(has_post_expert_norm=True))
    sample, bank = made()
    nested, _ = planes(sample, bank, 4, 2, 6)
    head, _ = fit_widths(sample, bank, nested, 0.01)
    with pytest.raises(PlanError, match="layer normalises what its experts return: apply the plan to measure it"):
        attach(head, block, None, nested)  # type: ignore[arg-type]
