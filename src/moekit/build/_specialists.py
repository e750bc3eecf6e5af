"""Dense specialists put together: each one's feed-forward layers are experts, their mean is what all tokens share.

BTX and the assembly of UniMoE-Audio. Shapes by suffix: I intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.bank import ExpertWeights
from moekit.build._dense import DenseFFN, dense_layers
from moekit.errors import OptionError, UnsupportedModelError
from moekit.nn import MoE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def assemble(model: PreTrainedModel, specialists: Sequence[PreTrainedModel]) -> None:
    """Fill an MoE model of ours with dense models of the same surroundings, in place.

    Expert e of a layer is the layer of specialist ``e % n``; the shared expert, one or several layers wide, adds the
    mean of the specialists' layers; what lies around the layers is the mean of theirs. Routers stay as they are.

    Raises:
        OptionError: no specialist, or sizes that do not fit together.
        UnsupportedModelError: a specialist has no layers to make experts of, or the model has no experts for them.
    """
    if not specialists:
        raise OptionError("no specialist to make experts of: give one dense model at least")
    layers = [dense_layers(specialist) for specialist in specialists]
    _surround(model, specialists, {ffn.name for ffn in layers[0]})
    for found in zip(*layers, strict=True):
        _fill(model, found)


def _surround(model: PreTrainedModel, specialists: Sequence[PreTrainedModel], inside: set[str]) -> None:
    """The mean of everything outside the layers that become experts."""
    states = [specialist.state_dict() for specialist in specialists]
    own = model.state_dict()
    for name in states[0]:
        if name.startswith(tuple(f"{layer}." for layer in inside)):
            continue
        tensors = [state.get(name) for state in states]
        if name not in own or any(tensor is None or tensor.shape != own[name].shape for tensor in tensors):
            raise OptionError(f"{name} is not the same size in the model and in every specialist, or is missing")
        if own[name].is_floating_point():
            own[name].copy_(torch.stack([tensor.float() for tensor in tensors if tensor is not None]).mean(0))


def _fill(model: PreTrainedModel, found: Sequence[DenseFFN]) -> None:
    """One layer: ``found`` are the specialists' layers in its place."""
    name, weights = found[0].name, [ffn.weights for ffn in found]
    layer = model.get_submodule(name)
    if not isinstance(layer, MoE):
        raise UnsupportedModelError(f"{name} is dense in the specialists and has no experts in the model")
    for expert in range(layer.num_experts):
        source = weights[expert % len(weights)]
        _copy(name, layer.experts.gate_up_proj[expert], source.gate_up)
        _copy(name, layer.experts.down_proj[expert], source.down)
    if layer.shared_expert is not None:
        _share(name, layer.shared_expert, mean(weights))


def mean(weights: Sequence[ExpertWeights]) -> ExpertWeights:
    """Of the weights, number by number."""
    gate_up = torch.stack([one.gate_up.float() for one in weights]).mean(0)
    return ExpertWeights(gate_up, torch.stack([one.down.float() for one in weights]).mean(0))


def _share(name: str, shared: torch.nn.Module, one: ExpertWeights) -> None:
    """The same layer as often as it fits, its outputs divided by how often: together they are the layer once."""
    gate, up = one.gate_up.chunk(2)
    times, rest = divmod(shared.down_proj.weight.shape[1], one.down.shape[1])
    if rest or not times:
        raise OptionError(
            f"{name} shares an expert {shared.down_proj.weight.shape[1]} wide, which layers {one.down.shape[1]} wide "
            "do not fill: choose a multiple"
        )
    _copy(name, shared.gate_proj.weight, gate.repeat(times, 1))
    _copy(name, shared.up_proj.weight, up.repeat(times, 1))
    _copy(name, shared.down_proj.weight, one.down.repeat(1, times) / times)


def _copy(name: str, target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise OptionError(f"{name} has experts of {list(target.shape)}, specialists of {list(source.shape)}")
    target.copy_(source)
