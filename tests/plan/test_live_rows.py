"""Blended router rows in a live model: the loss is that of the applied checkpoint, in memory and streamed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from applying import kept, plan_of, reload_here
from transformers import AutoModelForCausalLM

import families
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.errors import PlanError
from moekit.plan import LayerPlan, LiveLoss, Plan, apply
from moekit.plan.live_rows import live_rows, moved, standing
from moekit.plan.live_streamed import StreamedLoss
from moekit.stream import LoadedModel, StreamedModel

SEQUENCES = [np.random.default_rng(i).integers(3, families.VOCAB, 24) for i in range(3)]


def blended(layer: MoELayer) -> LayerPlan:
    """Three of four experts; the first two rows take in others, the third is the mean of two in one group."""
    plan = LayerPlan.keep(kept(layer), layer.num_experts)
    mixes = (((0, 0.75), (1, 0.25)), ((2, 1.0), (1, -0.5)), ((3, 0.5), (2, 0.5)))
    return replace(plan, rows=(*mixes, *plan.rows[3:]))


def saved(family: str, folder: Path) -> Checkpoint:
    families.build(family)[0].save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["moekit.plan.apply"], "reload_in_fresh_process", reload_here)


def divergence(folder: Path, source: Checkpoint) -> float:
    """What the applied checkpoint loses, computed from both models' predictions."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source.path, folder)]
    ids = torch.from_numpy(np.stack(SEQUENCES))
    with torch.no_grad():
        before, after = (model.eval()(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for model in models)
    return float((before.exp() * (before - after)).sum(-1).mean())


# A softmax; a bias and groups; biases in the score; a top-2; a bias beside a sigmoid.
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "glm4_moe"])
def test_the_live_loss_is_that_of_the_applied_checkpoint(family: str, loaded: None, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source")
    plan = plan_of(source, blended)
    live = LiveLoss(LoadedModel.load(source, dtype=torch.float32), source, SEQUENCES)
    found = live(plan)
    apply(source, plan, tmp_path / "out", text=None, format="moekit")
    expected = divergence(tmp_path / "out", source)
    assert found == pytest.approx(expected, rel=1e-3)
    unmixed = live(plan_of(source, lambda layer: LayerPlan.keep(kept(layer), layer.num_experts)))
    assert abs(unmixed - found) > 0.01 * found  # else nothing would have been tried
    streamed = StreamedLoss(StreamedModel(source, dtype=torch.float32), source, SEQUENCES)
    assert streamed(plan) == pytest.approx(found, rel=1e-3)
    live.restore()
    assert live(Plan(source=source.fingerprint, layers={})) == 0


def test_rows_stand_at_their_heaviest_source_or_near_it_in_its_group() -> None:
    mixes = (((5, 0.6), (0, 0.4)), ((5, 0.9), (1, 0.1)), ((0, 1.0),), ((7, 1.0),), ((6, 0.5), (7, 0.5)))
    plan = replace(LayerPlan.keep(range(5), 8), rows=mixes, slots=(0, 1, -1, 3, 4))
    assert standing(plan, None) == [5, 4, 0, 7, 6]
    assert standing(plan, (2, 1)) == [5, 4, 0, 7, 6]
    assert standing(replace(plan, rows=(*mixes[:3], ((4, 1.0),), mixes[4])), (2, 1)) == [5, 4, 0, 6, 7]
    assert live_rows(plan, None) == {5: 0, 4: 1, 7: 3, 6: 4}
    assert moved(plan, None) == {5: 0, 4: 1, 6: 4}
    assert not moved(LayerPlan.keep([1, 3], 4), None)


def test_what_only_an_applied_checkpoint_can_show(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path)
    live = LiveLoss(LoadedModel.load(source, dtype=torch.float32), source, SEQUENCES)
    name = source.moe_layers[0].name
    many = replace(
        LayerPlan.identity(8), rows=(*LayerPlan.identity(8).rows, ((0, 0.5), (1, 0.5))), slots=(*range(8), 0)
    )
    with pytest.raises(PlanError, match="9 router rows for 8 experts can only be measured once it is applied"):
        live(Plan(source=source.fingerprint, layers={name: many}))
    live._source = Shared(source)  # type: ignore[assignment]
    plan = Plan(source=source.fingerprint, layers={name: blended(source.layer(name))})
    with pytest.raises(PlanError, match=r"cannot hold such rows of .*gate.weight: apply the plan to measure it"):
        live(plan)
    live._source = source
    assert live(Plan(source=source.fingerprint, layers={})) == 0


class Shared:
    """A checkpoint whose router rows lie in one tensor with those of other layers."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def layer(self, name: str) -> MoELayer:
        found = self.source.layer(name)
        return replace(found, row_tensors=tuple(replace(tensor, part=0) for tensor in found.row_tensors))
