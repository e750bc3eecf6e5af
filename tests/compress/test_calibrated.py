"""Calibrated rounding of a layer: chunks change nothing, widths may differ, every fallback is named."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from moekit.algebra import TernaryMinMax
from moekit.compress import _calibrated, method
from moekit.compress._calibrated import DAMPING, Feedback, damping, joined, packed, ternary
from moekit.compress._sample import Sample, moe_output
from moekit.errors import OptionError
from moekit.formats import DenseBank, PackedBank, TernaryBank
from moekit.plan import Plan
from moekit.profile.layer import LayerProfile

E, H, INNER, S, K = 5, 12, 8, 90, 2
UNUSED = 4


@pytest.fixture
def bank() -> DenseBank:
    g = torch.Generator().manual_seed(0)
    shapes = [(E, 2 * INNER, H), (E, H, INNER), (E, 2 * INNER), (E, H)]
    return DenseBank(*(torch.randn(*shape, generator=g) for shape in shapes))


@pytest.fixture
def sample() -> Sample:
    """Correlated inputs; no token chooses ``UNUSED``, few choose expert 3."""
    draw = np.random.default_rng(0)
    expert = np.stack([draw.permutation(3)[:K] for _ in range(S)]).astype(np.int32)
    expert[:5, 0] = 3
    arrays = {
        "hidden": (draw.normal(size=(S, 4)) @ draw.normal(size=(4, H)) + 0.2 * draw.normal(size=(S, H))).astype("f4"),
        "sample_expert": expert,
        "sample_weight": draw.random((S, K)).astype(np.float32),
        "sample_domain": np.zeros(S, dtype=np.int32),
    }
    return Sample.of(LayerProfile("layer", 0, E, K, ("all",), arrays))


def same(a: PackedBank | TernaryBank, b: PackedBank | TernaryBank) -> bool:
    return a.describe() == b.describe() and all(torch.equal(t, b.tensors()[n]) for n, t in a.tensors().items())


MIXED = partial(packed, bits=[4, 2, 16, 3, 1], group_size=5)
TERNARY = partial(ternary, grid=TernaryMinMax(), feedback=Feedback())


@pytest.mark.parametrize("make", [MIXED, TERNARY])
def test_chunks_change_nothing(make, sample, bank, monkeypatch) -> None:
    whole, notes = make(sample, bank)
    monkeypatch.setattr(_calibrated, "CHUNK_BYTES", 1)
    chunked, again = make(sample, bank)
    assert same(whole, chunked)
    assert notes == again
    assert same(joined([whole.select([0, 1]), whole.select([2]), whole.select([3, 4])]), whole)
    assert torch.equal(whole.expert(3).down_bias, bank.expert(3).down_bias)


def test_every_expert_has_its_own_width(sample, bank) -> None:
    mixed, _ = packed(sample, bank, [2, 4, 16, 8, 3], 8)
    assert mixed.bits == (2, 4, 16, 8, 3)
    for e, width in enumerate(mixed.bits):
        alone, _ = packed(sample, bank, width, 8)
        assert torch.equal(alone.expert(e).gate_up, mixed.expert(e).gate_up)
    assert torch.equal(mixed.expert(2).down, bank.expert(2).down)


def test_outputs_on_the_sample_suffer_less_than_from_rounding(sample, bank) -> None:
    wanted = moe_output(sample, bank)
    made, notes = packed(sample, bank, 3, 16)
    ours, plain = (
        float((moe_output(sample, b.dequantise()) - wanted).square().sum())
        for b in (made, PackedBank.quantise(bank, 3, 16))
    )
    assert ours < 0.7 * plain
    assert f"on {S} sampled tokens; output error 0." in notes


def test_who_saw_nothing_is_rounded_to_nearest_and_named(sample, bank) -> None:
    made, notes = packed(sample, bank, 3, 16)
    plain = PackedBank.quantise(bank, 3, 16)
    assert torch.equal(made.expert(UNUSED).gate_up, plain.expert(UNUSED).gate_up)
    assert torch.equal(made.expert(UNUSED).down, plain.expert(UNUSED).down)
    assert "rounded to nearest because it got no inputs: 4" in notes
    assert "fewer than 16 tokens: 3" in notes
    lent, notes = packed(sample, bank, 3, 16, feedback=Feedback(lend=True))
    assert not torch.equal(lent.expert(UNUSED).gate_up, plain.expert(UNUSED).gate_up)
    assert torch.equal(lent.expert(0).gate_up, made.expert(0).gate_up)
    assert "lent all tokens for want of their own: 4" in notes
    assert "no inputs" not in notes


def test_moments_that_are_not_positive_definite_are_named(sample, bank) -> None:
    dead = Sample(sample.x_SH.clone(), sample.routing, E)
    dead.x_SH[sample.own(1).token_N] = torch.nan
    _, notes = packed(dead, bank, 3, 16)
    assert "rounded to nearest because the second moments of its inputs are not finite: 0, 1, 2, 3" in notes


def test_few_tokens_are_damped_more(sample, bank) -> None:
    assert [damping(64, n) for n in (10**6, 1600, 1599, 160, 54, 53, 16, 0)] == [
        0.01, 0.01, 0.03, 0.1, 0.3, 1.0, 1.0, 1.0,
    ]  # fmt: skip
    assert DAMPING[-1] == 1.0
    strong, _ = packed(sample, bank, 3, 16, feedback=Feedback(damping=1.0))
    made, _ = packed(sample, bank, 3, 16)
    assert torch.equal(strong.expert(3).gate_up, made.expert(3).gate_up)
    assert not torch.equal(strong.expert(0).gate_up, made.expert(0).gate_up)


def test_without_feedback_it_is_rounding_to_nearest(sample, bank) -> None:
    made, _ = packed(sample, bank, 4, 16, feedback=Feedback(columns=False, blocks=False))
    assert same(made, PackedBank.quantise(bank, 4, 16))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gptq:bits=5", "gptq: bits=5 is a precision no format has; use one of"),
        ("gptq:group_size=0", "gptq: group_size=0 must be positive"),
    ],
)
def test_impossible_sizes_are_refused(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(spec)


def test_the_baseline_is_the_part_with_one_width(model, profile) -> None:
    plan: Plan = method("gptq:bits=3,group_size=4,domains=code").plan(profile, model)
    for name, layer in plan.layers.items():
        wanted, notes = packed(Sample.of(profile.layers[name], ("code",)), model.bank(name), 3, 4)
        assert layer.values is not None
        assert same(layer.values.bank(), wanted)
        assert layer.why == f"all experts at 3 bits by GPTQ; {notes}"
        assert layer.routes_alike
