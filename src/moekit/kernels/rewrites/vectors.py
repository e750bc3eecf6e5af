"""Rewrites that let vectors stand in for the slots that do not run.

Shapes by suffix: T tokens, K slots, E experts, H hidden size, I intermediate size, N either of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ._rewrite import Rewrite, Routed, Scales, keep_slots, rank_of


class AuxiliaryVectors(Rewrite):
    """The ``main`` heaviest slots run; the others are stood in for by a vector each, which rescales the input.

    x' = x * (1 + sum_a w_a / (sum_a w_a) (theta[e_a] - 1)) over the slots a that do not run. ``theta`` [E, H]; with
    ones it is exactly :class:`TopSlots`.
    """

    KIND = "auxiliary-vectors"
    LEARNS: ClassVar[bool] = True

    def __init__(self, theta_EH: Tensor, main: int, *, renormalise: bool = True) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta_EH, requires_grad=False)
        self.main, self.renormalise = _at_least_one(main), renormalise

    def describe(self) -> dict[str, Any]:
        return {"kind": self.KIND, "main": self.main, "renormalise": self.renormalise}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        return cls(torch.empty(rows, hidden_size), describe["main"], renormalise=describe["renormalise"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        runs = rank_of(weight_TK) < self.main
        x = x_TH * _blended(self.theta, runs, index_TK, weight_TK).to(x_TH.dtype)
        return x, *keep_slots(index_TK, weight_TK, runs, renormalise=self.renormalise)


class ProjectionVectors(Rewrite):
    """The same with three vectors per expert, on what each of its matrices reads: ``gate`` and ``up`` [E, H], ``down``
    [E, I]. With ``gate`` equal to ``up`` and ones for ``down`` it computes what :class:`AuxiliaryVectors` does. An
    expert without a gate has no use for ``gate``."""

    KIND = "projection-vectors"
    INSIDE: ClassVar[bool] = True
    LEARNS: ClassVar[bool] = True

    def __init__(self, gate_EH: Tensor, up_EH: Tensor, down_EI: Tensor, main: int, *, renormalise: bool = True) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(t, requires_grad=False) for t in (gate_EH, up_EH, down_EI))
        self.main, self.renormalise = _at_least_one(main), renormalise

    @classmethod
    def ones(cls, rows: int, hidden_size: int, inner: int, main: int, *, renormalise: bool = True) -> Self:
        """Where training begins: vectors that change nothing."""
        gate, up, down = (torch.ones(rows, size) for size in (hidden_size, hidden_size, inner))
        return cls(gate, up, down, main, renormalise=renormalise)

    def describe(self) -> dict[str, Any]:
        inner = self.down.shape[1]
        return {"kind": self.KIND, "main": self.main, "renormalise": self.renormalise, "intermediate_size": inner}

    @classmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        inner, main = describe["intermediate_size"], describe["main"]
        return cls.ones(rows, hidden_size, inner, main, renormalise=describe["renormalise"])

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        runs = rank_of(weight_TK) < self.main
        return x_TH, *keep_slots(index_TK, weight_TK, runs, renormalise=self.renormalise)

    def scales(self, index_TK: Tensor, weight_TK: Tensor) -> Scales:
        runs = rank_of(weight_TK) < self.main
        return Scales(*(_blended(theta, runs, index_TK, weight_TK) for theta in (self.gate, self.up, self.down)))


def _at_least_one(main: int) -> int:
    if main < 1:
        raise OptionError(f"main={main} leaves nothing to run: keep at least 1 slot")
    return main


def _blended(theta_EN: Tensor, runs_TK: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """[T, N]: 1 + sum_a w_a / (sum_a w_a) (theta[e_a] - 1) over the slots a that do not run; 1 where there is none."""
    used = (index_TK >= 0) & (index_TK < len(theta_EN))
    share = torch.where(runs_TK | ~used, 0.0, weight_TK.float())
    share = share / share.sum(1, keepdim=True).clamp(min=1e-20)
    change = (theta_EN.float() - 1)[torch.where(used, index_TK, 0)]
    return 1 + (share[..., None] * change).sum(1)
