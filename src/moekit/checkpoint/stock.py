"""A bank under the names that ``save_pretrained`` gives it: the family's layout where no source file shows it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moekit.bank import ExpertBank
from moekit.checkpoint.structure import LayerShape
from moekit.errors import UnsupportedModelError


def stock_tensors(model: PreTrainedModel, shape: LayerShape, bank: ExpertBank) -> dict[str, Tensor]:
    """The bank as tensors of the stock checkpoint of ``model`` (its skeleton).

    Raises:
        UnsupportedModelError: a family that does not keep its experts in stacked parameters.
    """
    owner = f"{shape.name}.experts"
    state = model.state_dict()
    first = "gate_up_proj" if f"{owner}.gate_up_proj" in state else "up_proj"
    made: dict[str, Tensor] = {}
    for field, tensor in bank.tensors().items():
        part, bias = field.removesuffix("_bias"), "_bias" if field.endswith("_bias") else ""
        name = f"{owner}.{first if part == 'gate_up' else 'down_proj'}{bias}"
        if name not in state:
            raise UnsupportedModelError(f"{type(model).__name__} has no parameter {name} to unpack experts into")
        if part == "gate_up" and shape.interleaved:
            tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        made[name] = tensor.transpose(1, 2) if shape.transposed and not bias else tensor
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, made).items()}
