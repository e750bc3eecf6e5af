"""The feed-forward layers of a dense model as canonical weights: what experts are made of.

Shapes by suffix: T tokens, I intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.bank import ExpertWeights
from moekit.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class DenseFFN:
    """One feed-forward layer: ``down @ (act(gate @ x) * (up @ x))``. ``name`` is its path, ``layer`` its number.

    ``module`` is live; :attr:`weights` are views of its parameters where gate and up are one matrix, else copies.
    """

    name: str
    layer: int
    module: Any

    @property
    def weights(self) -> ExpertWeights:
        """gate_up [2I, H] and down [H, I]."""
        if hasattr(self.module, "gate_up_proj"):
            gate_up = self.module.gate_up_proj.weight
        else:
            gate_up = torch.cat([self.module.gate_proj.weight, self.module.up_proj.weight])
        return ExpertWeights(gate_up.detach(), self.module.down_proj.weight.detach())

    @property
    def intermediate_size(self) -> int:
        return int(self.module.down_proj.weight.shape[1])

    @property
    def act(self) -> Any:
        """What the gate passes through."""
        return self.module.act_fn if hasattr(self.module, "act_fn") else self.module.activation_fn


def dense_layers(model: nn.Module) -> list[DenseFFN]:
    """Every gated feed-forward layer of a dense model, in order.

    Raises:
        UnsupportedModelError: there is none that moekit can read, or one has biases.
    """
    found = list(_layers(model))
    for ffn in found:
        if any(child.bias is not None for child in ffn.module.children() if isinstance(child, nn.Linear)):
            raise UnsupportedModelError(f"{ffn.name} has biases, which experts made of it would lose")
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no feed-forward layer of gate, up and down matrices to make experts of"
        )
    return found


def feed_forward(model: nn.Module) -> list[str]:
    """Patterns of the names of everything in feed-forward layers, dense or sparse, with their routers."""
    dense = [ffn.name for ffn in _layers(model)]
    sparse = [name for name, module in model.named_modules() if isinstance(getattr(module, "experts", None), nn.Module)]
    return [f"{name}.*" for name in (*sparse, *(n for n in dense if not n.startswith(tuple(f"{s}." for s in sparse))))]


def _layers(model: nn.Module) -> Iterator[DenseFFN]:
    for name, module in model.named_modules():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is not None and _gated(module):
            yield DenseFFN(name, layer, module)


def _gated(module: Any) -> bool:
    def linear(name: str) -> bool:
        return isinstance(getattr(module, name, None), nn.Linear)

    both = (linear("gate_proj") and linear("up_proj")) or linear("gate_up_proj")
    return both and linear("down_proj") and (hasattr(module, "act_fn") or hasattr(module, "activation_fn"))


def part(weights: ExpertWeights, units: Tensor) -> ExpertWeights:
    """The expert that some of the hidden units ([n], by number) make: the same units of gate, up and down."""
    rows = torch.cat([units, units + weights.down.shape[1]])
    return ExpertWeights(weights.gate_up[rows], weights.down[:, units])
