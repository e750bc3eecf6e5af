"""For every family of the installed transformers: what a plan makes has the names and shapes that family loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from applying import keep, merge, plan_of

import families
from moekit.blocks.families import UNSUPPORTED
from moekit.checkpoint import Checkpoint
from moekit.errors import PlanError
from moekit.plan.apply import _check_loadable
from moekit.plan.layer import LayerPlan
from moekit.plan.loadable import dry_load, problems
from moekit.plan.produce import produce

REFUSED = {
    "deepseek_v4": r"tid2eid sends tokens to expert \d by their id",
    "doge": r"the number of router rows cannot change .the router of .* has no row per expert",
    "ernie4_5_vl_moe": r"holds the router rows of several modules",
    "jetmoe": r"the number of router rows cannot change .the same count sizes the attention experts",
}
"""Families whose stock format cannot have three quarters of the experts (the plan is refused before any work), and why:
routing by token id to an expert that is gone, product keys that need a square number, one tensor for two modules of
which each would have to change, attention experts that share the count with the feed-forward ones."""


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family not in UNSUPPORTED])
def test_names_and_shapes(family: str, tmp_path: Path) -> None:
    model, _ = families.build(family)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    identity = produce(checkpoint, plan_of(checkpoint, lambda layer: LayerPlan.identity(layer.num_experts)), "stock")
    assert {name: (lazy.dtype, lazy.shape) for name, lazy in identity.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()
    }
    for make in (keep, merge):
        plan = plan_of(checkpoint, make)
        if family in REFUSED:
            with pytest.raises(PlanError, match=REFUSED[family]):
                _check_loadable(checkpoint, produce(checkpoint, plan, "stock"))
            continue
        production = produce(checkpoint, plan, "stock")
        _check_loadable(checkpoint, production)
        for unit in production.units:
            for name, lazy in unit.tensors.items():
                tensor = lazy.make()
                assert (tensor.dtype, tuple(tensor.shape)) == (lazy.dtype, lazy.shape), name
        assert production.fates.keys() == checkpoint.tensors.keys()


def test_a_dry_load_misses_nothing_in_any_family_it_accepts(tmp_path: Path) -> None:
    """The same check on a source with one expert short must complain, or it proves nothing."""
    model, _ = families.build("qwen3_moe")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    specs = {name: (i.dtype, i.shape) for name, i in checkpoint.tensors.items() if ".experts.7." not in name}
    assert problems(dry_load(tmp_path, specs))


def test_a_plan_whose_output_would_not_load_is_refused(tmp_path: Path) -> None:
    model, _ = families.build("qwen3_moe")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    whole = produce(checkpoint, plan_of(checkpoint, lambda layer: LayerPlan.identity(layer.num_experts)), "stock")
    short = {name: lazy for name, lazy in whole.tensors.items() if ".experts.7." not in name}
    with pytest.raises(PlanError, match=r"qwen3_moe would not load what this plan leaves in the stock format"):
        _check_loadable(checkpoint, SimpleNamespace(tensors=short, config=whole.config, target=whole.target))
