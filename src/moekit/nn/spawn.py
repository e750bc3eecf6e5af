"""Experts that begin as one: it is trained alone, then all others are cut from it.

Shapes by suffix: T tokens, H hidden size, K slots, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .experts import Experts
from .parts import Site


class Spawning(Experts):
    """While ``alone``, the first expert computes for every token, with weight 1; then each is a masked copy of it.

    EvoMoE's first phase. A schedule moves ``alone``; when it turns false every expert becomes a copy of the first with
    another random share ``masked`` of its weights set to zero. Nothing stays masked: training goes on with all weights.
    """

    def __init__(self, config: Any, site: Site, *, masked: float = 0.1) -> None:
        super().__init__(config, site)
        if not 0 <= masked < 1:
            raise OptionError(f"masked={masked:g} is a share of an expert's weights: give 0 or more and less than 1")
        self.masked, self.layer = masked, site.layer
        self._alone = False

    @property
    def alone(self) -> bool:
        return self._alone

    @alone.setter
    def alone(self, value: bool) -> None:
        if self._alone and not value:
            self.spawn()
        self._alone = bool(value)

    @torch.no_grad()
    def spawn(self) -> None:
        """Overwrite all experts by masked copies of the first; the masks depend on nothing but the layer's number."""
        generator = torch.Generator().manual_seed(self.layer)
        for stacked in (self.gate_up_proj, self.down_proj):
            one = stacked[0].clone()
            for expert in stacked:
                expert.copy_(one * mask(one, self.masked, generator))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self._alone:
            top_k_index = torch.zeros_like(top_k_index[:, :1])
            top_k_weights = torch.ones_like(top_k_weights[:, :1])
        return super().forward(hidden_states, top_k_index, top_k_weights)


def mask(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Ones, and zeros in the given share of places, rounded to a whole number of them."""
    flat = torch.ones(like.numel(), dtype=like.dtype)
    flat[torch.randperm(like.numel(), generator=generator)[: round(share * like.numel())]] = 0
    return flat.view(like.shape).to(like.device)
