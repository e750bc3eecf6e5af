"""What the tests of apply and verify share: tiny sources, plans, and a reload check that skips the new process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import families
import moekit
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.formats import DenseBank
from moekit.plan import reload_check
from moekit.plan.document import Plan
from moekit.plan.layer import LayerPlan, StoredExpert
from moekit.plan.recombine import stored
from moekit.plan.reload import reload_problem


def reload_here(folder: Path, *, with_moekit: bool, excused: Collection[str] = ()) -> dict[str, Any]:
    """As ``reload_in_fresh_process`` without paying for a new process; one test takes the real one."""
    found = reload_check.check(str(folder))
    problem = reload_problem(found, excused)
    assert problem is None, problem
    return {"how": "loaded in this process", "imports": ["moekit"] if with_moekit else [], **found}


def plan_of(checkpoint: Checkpoint, make: Callable[[MoELayer], LayerPlan], **options: Any) -> Plan:
    """A plan that does the same to every layer that text runs through."""
    layers = {layer.name: make(layer) for layer in checkpoint.moe_layers if not layer.extra}
    return Plan(source=checkpoint.fingerprint, layers=layers, methods=("by-hand",), **options)


def kept(layer: MoELayer) -> list[int]:
    """Three quarters of the experts, as many in each group."""
    return [e for e in range(layer.num_experts) if e % 4 != 1]


def keep(layer: MoELayer) -> LayerPlan:
    return LayerPlan.keep(kept(layer), layer.num_experts, why="three of four")


def merge(layer: MoELayer) -> LayerPlan:
    """Keep three of four; the first stored expert takes in a quarter of expert 1."""
    plan = keep(layer)
    first = StoredExpert(((0, 0.75), (1, 0.25)))
    return replace(plan, experts=(first, *plan.experts[1:]))


def alias(layer: MoELayer) -> LayerPlan:
    """Neighbours become one expert each; every router row stays."""
    pairs = [StoredExpert(((e, 0.5), (e + 1, 0.5))) for e in range(0, layer.num_experts, 2)]
    return LayerPlan.aliased(pairs, [e // 2 for e in range(layer.num_experts)])


def mixed(layer: MoELayer) -> LayerPlan:
    """Different counts by layer, different bits by expert."""
    plan = LayerPlan.identity(layer.num_experts) if layer.layer % 2 else keep(layer)
    return plan.with_bits([(8, 4, 16)[i % 3] for i in range(len(plan.experts))], 16)


def edited(model: PreTrainedModel, checkpoint: Checkpoint, plan: Plan) -> PreTrainedModel:
    """The live model as the plan leaves it: its own experts overwritten, dropped rows masked."""
    for block in moekit.blocks(model):
        layer = plan.layers[block.name]
        weights = stored(checkpoint.bank(block.name), layer)
        heaviest = {
            max(row, key=lambda part: part[1])[0]: slot for row, slot in zip(layer.rows, layer.slots, strict=True)
        }
        experts = [weights.expert(max(heaviest.get(row, 0), 0)) for row in range(block.num_experts)]
        block.put(DenseBank.stack(experts, weights.activation))
        alive = [row for row in range(block.num_experts) if heaviest.get(row, -1) >= 0]
        if len(alive) < block.num_experts:
            block.mask(alive).attach()
    return model


def expected_logits(family: str, checkpoint: Checkpoint, plan: Plan, **overrides: Any) -> torch.Tensor:
    model, inputs = families.build(family, **overrides)
    return logits(edited(model, checkpoint, plan), inputs)


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
