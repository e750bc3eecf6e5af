"""A rewrite that runs each slot at a precision of its own.

Shapes by suffix: T tokens, K slots, E experts, W widths, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...formats import NestedBank
from ._rewrite import PAD, Rewrite, Routed


class BitWidths(Rewrite):
    """A linear head per expert says at which of its nested widths it runs a token: the argmax, the narrower of equals.

    Expert e at the w-th width has the id e * W + w among those of :meth:`runs`. Parameters: ``weight`` [E, W, H],
    ``bias`` [E, W].
    """

    KIND = "bit-widths"
    EXPANDS = True

    def __init__(self, widths: Sequence[int], weight_EWH: Tensor, bias_EW: Tensor) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.weight, self.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight_EWH, bias_EW))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "widths": list(self.widths)}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        widths = describe["widths"]
        return cls(widths, torch.empty(rows, len(widths), hidden_size), torch.empty(rows, len(widths)))

    def choice(self, x_TH: Tensor, index_TK: Tensor) -> Tensor:
        """[T, K]: which width each slot runs at, as index into ``widths``."""
        experts, widths = self.bias.shape
        logits = nn.functional.linear(x_TH.float(), self.weight.float().flatten(0, 1), self.bias.float().flatten())
        best_TE = logits.view(-1, experts, widths).argmax(-1)
        return best_TE.gather(1, index_TK.clamp(0, experts - 1))

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        used = (index_TK >= 0) & (index_TK < len(self.bias))
        at = index_TK * len(self.widths) + self.choice(x_TH, index_TK)
        return x_TH, torch.where(used, at, PAD), weight_TK

    def runs(self, bank: Any) -> Any:
        """Every expert at every width; planes are shared, nothing is copied."""
        if not isinstance(bank, NestedBank):
            raise OptionError(f"widths per token need experts stored as nested planes, not as {type(bank).__name__}")
        stored, count = {}, len(self.widths)
        for place, width in enumerate(self.widths):
            for name, tensor in bank.at(width).stored.items():
                expert, _, rest = name.partition(".")
                stored[f"{int(expert) * count + place}.{rest}"] = tensor
        sizes = tuple(size for size in bank.group_size for _ in self.widths)
        return replace(bank, stored=stored, bits=self.widths * bank.num_experts, group_size=sizes)
