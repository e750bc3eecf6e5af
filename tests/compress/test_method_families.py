"""Every method on three kinds of families: it plans, its plan is applied, and stock loading computes what was planned.

A softmax router with top-k; a sigmoid router with a selection bias, groups and shared experts; a router and experts
with biases whose gate and up rows are interleaved.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import method, methods
from moekit.plan import LiveLoss, apply, make_plan
from moekit.profile import FIELDS, Profile, profile
from moekit.stream import LoadedModel

THREE = ("qwen3_moe", "deepseek_v3", "gpt_oss")
OPTIONS = {
    "eep": "eep:evaluations=8",
    "mc-moe": "mc-moe:skip=0.5",
    "super-experts": "super-experts:planner=reap:keep=6",
}
"""Where a method's defaults do more than a test needs, or nothing."""


@dataclass(frozen=True)
class Family:
    source: Checkpoint
    seen: Profile
    live: LiveLoss
    runner: LoadedModel
    inputs: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=THREE)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    model, inputs = families.build(request.param)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(lab.mini()).save_pretrained(folder)  # profiling asks for one, though it reads ids
    source = Checkpoint.open(folder)
    runner = LoadedModel.load(source, dtype=torch.float32)
    draw = np.random.default_rng(0)
    texts = {domain: [draw.integers(3, families.VOCAB, 64) for _ in range(4)] for domain in ("one", "two")}
    seen = profile(runner, texts, held_out=0.0, sample=256, trace=0, statistics=tuple(FIELDS))
    live = LiveLoss(runner, source, [texts["one"][0], texts["two"][0]])
    return Family(source, seen, live, runner, inputs)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that applying loads to prove its outputs; in this process, and by ``from_pretrained`` alone."""
    found: list[Any] = []

    def load(folder: Path, *, with_moekit: bool, excused: object = ()) -> dict[str, Any]:
        model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
        found.append(model.eval())
        return {"how": "here", "imports": [], "model": type(model).__name__, "parameters": model.num_parameters()}

    monkeypatch.setattr(sys.modules["moekit.plan.apply"], "reload_in_fresh_process", load)
    return found


@pytest.mark.parametrize("name", methods())
def test_what_is_planned_is_what_loads(name: str, family: Family, loaded: list[Any], tmp_path: Path) -> None:
    planner = method(OPTIONS.get(name, name))
    plan = make_plan([planner], family.source, family.seen, family.live)
    family.live.restore()
    apply(family.source, plan, tmp_path / "out", text=None)
    with torch.no_grad():
        found = loaded[-1](**family.inputs).logits
        assert found.isfinite().all()
        family.live.become(plan)
        try:
            expected = family.runner.model(**family.inputs).logits
        finally:
            family.live.restore()
    assert torch.allclose(found, expected, atol=2e-3), (found - expected).abs().max()
