"""A plan that rounds, rounded with calibration: as large to the byte, and nearer to the source's outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import calibratable, calibrated
from moekit.plan import LayerPlan, LiveLoss, Plan, fit
from moekit.plan.sizes import plan_nbytes
from moekit.profile import Profile, profile
from moekit.stream import LoadedModel

TEXT = {"prose": [lab.text("prose", "calibration", 6000, 2)]}


@pytest.fixture(scope="module")
def runner() -> LoadedModel:
    return LoadedModel.load(Checkpoint.open("moekit:mini"), dtype=torch.float32)


@pytest.fixture(scope="module")
def seen(runner: LoadedModel) -> Profile:
    return profile(runner, TEXT, sample=1024, held_out=0.3, sequence_length=256)


def rounded(source: Checkpoint, bits: tuple[int, ...]) -> Plan:
    """Experts at these widths in turn, in two layers; one of them dropped."""
    layers = {}
    for layer in source.moe_layers[:2]:
        plan = LayerPlan.keep(range(1, layer.num_experts), layer.num_experts)
        each = [bits[e % len(bits)] for e in range(len(plan.experts))]
        layers[layer.name] = plan.with_bits(each, [32 if width == 4 else 64 for width in each])
    return Plan(source=source.fingerprint, layers=layers)


def test_same_bytes_widths_and_experts_but_nearer(runner: LoadedModel, seen: Profile) -> None:
    source = Checkpoint.open("moekit:mini")
    plan = rounded(source, (2, 4, 16))
    better = calibrated(plan, source, seen)
    assert plan_nbytes(better, source) == plan_nbytes(plan, source)
    for name, layer in plan.layers.items():
        assert better.layers[name].widths == layer.widths
        assert [e.parts for e in better.layers[name].experts] == [e.parts for e in layer.experts]
    rows = [np.asarray(piece) for piece in seen.held_out["prose"]]
    judge = LiveLoss(runner, source, rows)
    losses = [judge(one) for one in (plan, better)]
    judge.restore()
    assert losses[1] < losses[0]


def test_what_is_not_rounded_stays(seen: Profile) -> None:
    source = Checkpoint.open("moekit:mini")
    whole = rounded(source, (16,))
    assert calibrated(whole, source, seen).layers == whole.layers
    once = calibrated(rounded(source, (3,)), source, seen)
    assert calibrated(once, source, seen).layers == once.layers


def test_few_sampled_tokens_are_too_few(runner: LoadedModel, seen: Profile) -> None:
    assert calibratable(seen)
    assert not calibratable(profile(runner, TEXT, sample=64, sequence_length=256))


def test_fit_tries_calibration_and_says_so(runner: LoadedModel, seen: Profile) -> None:
    source = Checkpoint.open("moekit:mini")
    tried: list[Plan] = []

    def finish(plan: Plan) -> Plan:
        tried.append(plan)
        return plan

    ways = {"again": finish, "and again": finish}
    fit(source, seen, ratio=0.5, evaluate=lambda plan: float(len(tried)), finish=ways, weights=False)
    assert 2 <= len(tried) <= 3  # the second way on one plan only
    assert all(any(e.bits != 16 for layer in plan.layers.values() for e in layer.experts) for plan in tried)
