"""Several mixers of tokens side by side.

Shapes by suffix: B sequences, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .parts import Spec, make


class Sum(nn.Module):
    """``sum_i g_i mixer_i(x)`` with learnt scalars g that begin as ``gates`` says (Hydra: 1, and 0.15 for attention).

    A layer has room for the keys and values of one mixer: with several that keep them, texts are run anew. Raises
    :class:`OptionError` where the numbers do not match.
    """

    def __init__(self, config: Any, layer: int, *, of: Sequence[Spec], gates: Sequence[float]) -> None:
        super().__init__()
        from .mixers import ATTENTIONS

        if not of or len(of) != len(gates):
            raise OptionError(
                f"a sum of {len(of)} mixers with {len(gates)} gates: give one gate for each, one at least"
            )
        self.mixers = nn.ModuleList(make("attention", ATTENTIONS, one, config, layer) for one in of)
        self.cached = sum(getattr(one, "cached", True) for one in self.mixers) <= 1
        self.start = tuple(float(gate) for gate in gates)
        self.gate = nn.Parameter(torch.tensor(self.start))

    def initialise(self, std: float) -> None:
        init.copy_(self.gate, torch.tensor(self.start))

    def forward(self, hidden_BSH: Tensor, context: Context, **attention: Any) -> Tensor:
        """[B, S, H]."""
        return sum(
            gate * one(hidden_BSH, context, **attention) for gate, one in zip(self.gate, self.mixers, strict=True)
        )
