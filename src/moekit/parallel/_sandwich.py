"""Depth-scaled sandwich norms and small beginnings, which keep the residual stream of a deep model from growing.

``h + norm_post(f(norm_pre(h)))`` with the gain of ``norm_post`` begun at c / sqrt(L): each of a model's 2 L sublayers
adds a vector of root mean square c / sqrt(L), whatever its weights (Pangu Ultra, arXiv 2504.07866). L counts layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moekit.blocks import blocks
from moekit.errors import OptionError, UnsupportedModelError

NAME = "sandwich_norm"


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers that the model's MoE blocks lie in.

    Raises :class:`UnsupportedModelError` where there is none.
    """
    for block in blocks(model):
        parts = block.name.split(".")
        for end in range(len(parts), 0, -1):
            found = model.get_submodule(".".join(parts[:end]))
            if isinstance(found, nn.ModuleList):
                return found
    raise UnsupportedModelError(f"{type(model).__name__} has no list of layers with experts in them")


def sandwiched(model: nn.Module, hidden_size: int, gain: float = 1.0, eps: float = 1e-6) -> list[nn.RMSNorm]:
    """Norm what every sublayer returns, in place; the norms become parameters of the sublayers (``sandwich_norm``).

    A sublayer is what a layer holds besides its own norms: a child with a matrix. Raises :class:`OptionError` for a
    gain that is not above 0 or a model that has them already.
    """
    if gain <= 0:
        raise OptionError(f"gain={gain:g} of the sandwich norms: give a number above 0")
    layers, made = layers_of(model), []
    for layer in layers:
        for child in layer.children():
            if not any(p.dim() > 1 for p in child.parameters()):
                continue
            if hasattr(child, NAME):
                raise OptionError(f"{type(model).__name__} has sandwich norms already")
            like = next(p for p in child.parameters() if p.dim() > 1)
            norm = nn.RMSNorm(hidden_size, eps=eps, device=like.device, dtype=like.dtype)
            nn.init.constant_(norm.weight, gain / math.sqrt(len(layers)))
            child.add_module(NAME, norm)
            child.register_forward_hook(_norm)
            made.append(norm)
    return made


def _norm(module: nn.Module, args: Any, output: Any) -> Any:
    norm: Any = getattr(module, NAME)
    return (norm(output[0]), *output[1:]) if isinstance(output, tuple) else norm(output)


@torch.no_grad()
def tiny_init(model: nn.Module, hidden_size: int, seed: int = 0) -> float:
    """Draw every matrix anew from N(0, 1 / (2 d L)) and return that standard deviation; vectors stay."""
    std = math.sqrt(1 / (2 * hidden_size * len(layers_of(model))))
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * std)
    return std
