"""Router rows of a plan's output in a live model: where each stands among the source's rows, and what is written there.

Every row takes the place it would have in moekit's own format; the other places are masked. A row that is not the
source's own at its place (blended, or moved) is written over it in every tensor that has a row per expert, so that
norms, soft caps, biases and scales of a family act on it as they would in the output.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import nn

from moekit.errors import PlanError
from moekit.plan.layer import LayerPlan
from moekit.plan.router_pieces import blend, id_tables
from moekit.plan.target import places

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer

Groups = tuple[int, int] | None


def standing(plan: LayerPlan, groups: Groups) -> list[int]:
    """The place of every row of the output among the E of the source.

    Raises:
        PlanError: there are more rows than places.
    """
    if len(plan.rows) > plan.num_experts:
        raise PlanError(
            f"a plan with {len(plan.rows)} router rows for {plan.num_experts} experts can only be measured once it is "
            "applied"
        )
    return places(plan.rows, plan.num_experts, groups)


def live_rows(plan: LayerPlan, groups: Groups) -> dict[int, int]:
    """Place -> stored expert, for the rows that can be chosen."""
    return {place: slot for place, slot in zip(standing(plan, groups), plan.slots, strict=True) if slot >= 0}


def moved(plan: LayerPlan, groups: Groups) -> dict[int, int]:
    """Place -> row of the output, for the rows that can be chosen and are not the source's own at their place."""
    rows = zip(standing(plan, groups), plan.rows, plan.slots, strict=True)
    return {place: r for r, (place, row, slot) in enumerate(rows) if slot >= 0 and row != ((place, 1.0),)}


@torch.no_grad()
def write_rows(
    model: nn.Module, source: Checkpoint, layer: MoELayer, before: LayerPlan | None, after: LayerPlan
) -> None:
    """Put the rows of ``after`` that are not the source's own into ``model``, and back those that ``before`` replaced.

    Raises:
        PlanError: the rows lie in a tensor that several layers share, in a form the model does not hold them in, or
            experts are chosen from a table of token ids.
    """
    rows = moved(after, layer.groups)
    if not rows and not (before is not None and moved(before, layer.groups)):
        return
    parameters = {t.name: attrgetter(source.classified.parameters[t.name])(model) for t in layer.row_tensors}
    for tensor in layer.row_tensors:
        alike = parameters[tensor.name].shape == source.tensors[tensor.name].shape
        if tensor.part is not None or not alike or any(id_tables(source, layer)):
            raise PlanError(
                f"the plan blends router rows, and a live model cannot hold such rows of {tensor.name}: apply the plan "
                "to measure it"
            )
    for tensor in layer.row_tensors:
        edited = after.values is not None and tensor.name in after.values.edits
        own = after.values.edit(tensor.name) if after.values and edited else source.read(tensor.name)
        own = own.movedim(tensor.axis, 0)
        new = own.clone()
        for place, row in rows.items():
            new[place] = blend(own, after.rows[row])
        parameters[tensor.name].copy_(new.movedim(0, tensor.axis))
