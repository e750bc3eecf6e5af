"""A rewrite that chooses anew, by logits of its own.

Shapes by suffix: T tokens, K slots, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ._rewrite import Rewrite, Routed


class ResidualGate(Rewrite):
    """The choice is made anew: the ``count`` rows of highest logit r = W x, each with weight 1 + r.

    With W = 0 and every row chosen, experts that are slices of a dense layer add up to that layer exactly.
    """

    KIND = "residual-gate"
    LEARNS: ClassVar[bool] = True

    def __init__(self, weight_EH: Tensor, count: int) -> None:
        super().__init__()
        if not 1 <= count <= weight_EH.shape[0]:
            raise OptionError(f"{count} slots of {weight_EH.shape[0]} experts are not possible")
        self.count = count
        self.weight = nn.Parameter(weight_EH, requires_grad=False)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "count": self.count}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        return cls(torch.empty(rows, hidden_size), describe["count"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        logits = nn.functional.linear(x_TH.float(), self.weight.float())
        chosen = logits.topk(self.count, dim=-1)
        return x_TH, chosen.indices, (1 + chosen.values).to(weight_TK.dtype)
