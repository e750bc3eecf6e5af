"""The experts implementation "moekit": one function behind every experts module of transformers' shared contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arrivals import Arrivals
from ._drive import forward
from ._layer import Layer
from .plain import PlainProducts
from .training import train

NAME = "moekit"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[T, H]: what the module's own eager loop returns, to float accuracy, forward and backward.

    ``top_k_index`` [T, K] may hold the sentinel ``num_experts`` (expert parallelism, unused slots): such a slot adds
    nothing and gets no gradient, whatever its weight.
    """
    prepared = self.__dict__.get("_moekit_prepared")
    if prepared is not None and prepared.dropped:
        return prepared(hidden_states, top_k_index, top_k_weights)
    layer = Layer.of_module(self)
    if torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = hidden_states.to(layer.down.dtype)
    if needs_gradients(layer, hidden_states, top_k_weights):
        return train(layer, hidden_states, top_k_index, top_k_weights)
    if prepared is not None:
        return prepared(hidden_states, top_k_index, top_k_weights)
    return forward(PlainProducts(layer), hidden_states, top_k_index, top_k_weights)


def needs_gradients(layer: Layer, x_TH: Tensor, weight_TK: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = (x_TH, weight_TK, layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias)
    return layer.trainable_between or any(t is not None and t.requires_grad for t in tensors)


class ArrivingExperts:
    """The plain experts of one module, whose weights come while they are computed. No backward.

    ``apart``: the up (with gate) and down matrices by expert, oriented as :class:`Layer` has them, where they do not
    come to the module's own places.
    """

    def __init__(self, module: Any, apart: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> None:
        self._products = PlainProducts(Layer.of_module(module), apart)

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, arrivals: Arrivals) -> Tensor:
        """[T, H]: bit for bit what :func:`experts_forward` returns without gradients when all weights are there (to
        float accuracy where they lie apart)."""
        return forward(self._products, x_TH, index_TK, weight_TK, arrivals=arrivals)


def register() -> None:
    """Make ``experts_implementation="moekit"`` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
