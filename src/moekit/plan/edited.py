"""Tensors around the experts that a plan replaces (a norm, a router), in a live model instead of on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from moekit.errors import PlanError
from moekit.plan.layer import LayerPlan

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint


@torch.no_grad()
def overwrite(model: nn.Module, source: Checkpoint, before: LayerPlan | None, after: LayerPlan) -> None:
    """Put the tensors that ``after`` replaces into ``model``, and back those of ``source`` that ``before`` replaced.

    Raises:
        PlanError: a tensor that is only part of a parameter of the model.
    """
    old, new = (set(plan.values.edits) if plan and plan.values else set() for plan in (before, after))
    for name in sorted(old | new):
        parameter = model.get_parameter(source.classified.parameters[name])
        tensor = after.values.edit(name) if after.values and name in new else source.read(name)
        if tensor.shape != parameter.shape:
            raise PlanError(f"the plan replaces {name}, a part of a larger parameter: apply the plan to measure it")
        parameter.copy_(tensor)
