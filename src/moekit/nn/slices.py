"""A dense feed-forward layer as experts and back: cut along its hidden units, the pieces add up to the whole.

Shapes by suffix: E slices, I hidden units of a slice, H hidden size.
"""

from __future__ import annotations

import torch

from ..errors import OptionError
from .experts import Experts, FeedForward, Standalone
from .parts import Site


def cut(whole: FeedForward, slices: int, config: object | None = None) -> Experts:
    """Experts of equal width, slice i with the i-th hidden units; chosen all with weight 1 they give the layer itself.

    Union of Experts, its equivalent decomposition of a multi-layer perceptron. ``config`` says which implementation
    runs the experts (moekit's if None). Raises :class:`OptionError` where the units do not divide.
    """
    units, size = whole.gate_proj.weight.shape
    if slices < 1 or units % slices:
        raise OptionError(f"{units} hidden units cannot be cut in {slices} equal slices")
    site = Site(hidden_size=size, intermediate_size=units // slices, num_experts=slices)
    experts = Experts(config or Standalone(), site)
    gate, up = (part.weight.view(slices, -1, size) for part in (whole.gate_proj, whole.up_proj))
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat((gate, up), dim=1))
        experts.down_proj.copy_(whole.down_proj.weight.view(size, slices, -1).transpose(0, 1))
    experts.act_fn = whole.act_fn
    return experts.to(whole.gate_proj.weight.dtype)


def joined(experts: Experts) -> FeedForward:
    """The dense layer whose slices these experts are."""
    count, size, units = experts.down_proj.shape
    whole = FeedForward(size, count * units).to(experts.down_proj.dtype)
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    with torch.no_grad():
        whole.gate_proj.weight.copy_(gate.reshape(-1, size))
        whole.up_proj.weight.copy_(up.reshape(-1, size))
        whole.down_proj.weight.copy_(experts.down_proj.transpose(0, 1).reshape(size, -1))
    whole.act_fn = experts.act_fn
    return whole
