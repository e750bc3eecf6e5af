"""Where a builder's teacher comes from."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from moekit.checkpoint import Checkpoint
from moekit.stream import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SELF = "self"


def load_teacher(ref: str, model: PreTrainedModel) -> PreTrainedModel:
    """The checkpoint that ``ref`` names, in float32 where the model is, frozen; "self": a copy of the model itself."""
    if ref == SELF:
        teacher = copy.deepcopy(model)
    else:
        teacher = LoadedModel.load(Checkpoint.open(ref), device=model.device, dtype=torch.float32).model
    return teacher.eval().requires_grad_(False)
