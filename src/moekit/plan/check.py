"""Is a plan sane, by itself and for the model it is meant for? One PlanError line per way it can be nonsense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moekit.errors import PlanError, UnsupportedModelError
from moekit.formats import WIDTHS
from moekit.plan.layer import LayerPlan, Row, StoredExpert

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.plan.document import Plan

BITS = WIDTHS
"""Precisions an output format can store; 16 stands for the source's own."""


def check_plan(plan: Plan, checkpoint: Checkpoint) -> None:
    """PlanError unless ``plan`` is sane for ``checkpoint``: its source, its layers, its expert counts and groups."""
    if plan.source != checkpoint.fingerprint:
        raise PlanError(
            f"the plan is for another model (fingerprint {plan.source[:12]}, this one has "
            f"{checkpoint.fingerprint[:12]}): make a plan from this checkpoint"
        )
    check_routers(checkpoint.moe_layers)
    layers = {layer.name: layer for layer in checkpoint.moe_layers}
    for name, layer in plan.layers.items():
        if name not in layers:
            known = ", ".join(list(layers)[:3])
            raise PlanError(f"the plan names a layer {name} that the model does not have; its layers are {known}, ...")
        found = layers[name]
        if layer.num_experts != found.num_experts:
            raise PlanError(
                f"layer {name}: the plan is for {layer.num_experts} experts, the model has {found.num_experts}"
            )
        check_layer(name, layer, top_k=found.top_k, groups=found.groups)


def check_routers(layers: Iterable[Any]) -> None:
    """UnsupportedModelError where several routers choose from the experts of one of these layers of a checkpoint."""
    for layer in layers:
        if layer.users > 1:
            raise UnsupportedModelError(
                f"{layer.users} routers choose from the experts of {layer.name}, and a plan is for one router and its "
                "experts: such a model can be trained, run and profiled, but not compressed"
            )


def check_layer(name: str, layer: LayerPlan, *, top_k: int = 1, groups: tuple[int, int] | None = None) -> None:
    """PlanError unless the layer's own numbers make sense for ``num_experts``, ``top_k`` and ``groups``."""
    where = f"layer {name}"
    if not layer.experts:
        raise PlanError(f"{where}: no expert is kept; keep at least the top-k, {top_k}")
    if len(layer.slots) != len(layer.rows):
        raise PlanError(
            f"{where}: {len(layer.slots)} slots for {len(layer.rows)} router rows; every row needs one slot"
        )
    for index, expert in enumerate(layer.experts):
        _check_expert(f"{where}, stored expert {index}", expert, layer.num_experts)
    if layer.values is not None and layer.values.chosen is not None and len(layer.values.chosen) != len(layer.experts):
        raise PlanError(f"{where}: values of {len(layer.values.chosen)} experts for {len(layer.experts)} stored ones")
    for index, slot in enumerate(layer.slots):
        if not -1 <= slot < len(layer.experts):
            raise PlanError(f"{where}: slot {index} calls stored expert {slot}, but there are {len(layer.experts)}")
    for index, row in enumerate(layer.rows):
        _check_mix(f"{where}, router row {index}", row, layer.num_experts)
    if len(set(layer.rows)) != len(layer.rows):
        raise PlanError(f"{where}: two router rows of the output are the same source row; each may be used once")
    unused = set(range(len(layer.experts))) - set(layer.slots)
    if unused:
        raise PlanError(f"{where}: stored expert {min(unused)} is called by no router row; drop it or give it a slot")
    live = sum(slot >= 0 for slot in layer.slots)
    if live < top_k:
        raise PlanError(
            f"{where}: {live} experts can be chosen, fewer than the top-k of {top_k}; keep at least {top_k}"
        )
    if groups and groups[0] > 1:
        _check_groups(where, layer, top_k, groups)


def _check_expert(where: str, expert: StoredExpert, num_experts: int) -> None:
    _check_mix(where, expert.parts, num_experts)
    if expert.bits not in BITS:
        raise PlanError(f"{where}: {expert.bits} bits is a precision no format has; use one of {BITS}")
    if expert.group_size < 1:
        raise PlanError(f"{where}: group_size {expert.group_size} must be positive")
    if expert.orders and len(expert.orders) != len(expert.parts):
        raise PlanError(f"{where}: {len(expert.orders)} hidden-unit orders for {len(expert.parts)} parts")
    for order in expert.orders:
        if order and sorted(order.array().tolist()) != list(range(len(order))):
            raise PlanError(f"{where}: a hidden-unit order is no permutation; each unit must appear once")


def _check_mix(where: str, mix: Row, num_experts: int) -> None:
    if not mix:
        raise PlanError(f"{where}: made of nothing; name at least one source expert")
    for source, coefficient in mix:
        if not 0 <= source < num_experts:
            raise PlanError(f"{where}: expert {source} does not exist; the layer has experts 0 to {num_experts - 1}")
        if not math.isfinite(coefficient):
            raise PlanError(f"{where}: the coefficient of expert {source} is {coefficient}, expected a finite number")


def _check_groups(where: str, layer: LayerPlan, top_k: int, groups: tuple[int, int]) -> None:
    """Group-limited routers view the rows as [groups, rows per group]: uneven counts give wrong results silently."""
    counts = group_counts(layer, groups[0])
    live = [count for count in counts.values() if count]
    if len(set(live)) != 1:
        shown = ", ".join(str(count) for count in counts.values())
        raise PlanError(
            f"{where}: its router chooses among {groups[0]} groups, and the plan keeps {shown} rows of them; "
            "keep the same number in each group, or drop whole groups"
        )
    if live[0] < 2:
        raise PlanError(
            f"{where}: one row per group is left, but groups are ranked by their best two; keep two or more"
        )
    if len(live) < groups[1]:
        raise PlanError(f"{where}: {len(live)} groups are left, fewer than the {groups[1]} a token may use")
    if live[0] * groups[1] < top_k:
        raise PlanError(
            f"{where}: {groups[1]} groups of {live[0]} cannot hold the top-k of {top_k}; keep more per group"
        )
    order = [_group(row, layer.num_experts // groups[0], where) for row in layer.rows]
    if order != sorted(order):
        raise PlanError(f"{where}: router rows of one group must stay together and in order of the groups")


def group_counts(layer: LayerPlan, num_groups: int) -> Mapping[int, int]:
    """Router rows of the output by the group of their source rows."""
    size = layer.num_experts // num_groups
    counts = dict.fromkeys(range(num_groups), 0)
    for row in layer.rows:
        counts[_group(row, size, "layer")] += 1
    return counts


def _group(row: Row, size: int, where: str) -> int:
    groups = {source // size for source, _ in row}
    if len(groups) != 1:
        raise PlanError(f"{where}: a router row blends rows of several groups; blend inside one group")
    return groups.pop()
