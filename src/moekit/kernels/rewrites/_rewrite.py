"""What every rewrite of a routing is, and what several of them do to slots.

Shapes by suffix: T tokens, K slots, H hidden size, I intermediate size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

PAD = -1
Routed = tuple[Tensor, Tensor, Tensor]
"""Input [T, H], expert ids [T, K] and combine weights [T, K]."""


class Scales(NamedTuple):
    """What each token multiplies the inputs of an expert's matrices by, whichever expert it is: ``gate`` and ``up``
    [T, H], ``down`` [T, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Rewrite(nn.Module, ABC):
    """``KIND`` names it in descriptions; parameters are named as on disk under ``experts.rewrite``.

    ``EXPANDS`` says whether rewritten ids name more than the layer's own experts (:meth:`runs`), ``INSIDE`` whether the
    inputs of an expert's matrices are scaled apart (:meth:`scales`), ``LEARNS`` whether a gradient of what the model
    computes reaches the parameters.
    """

    KIND: ClassVar[str]
    INSIDE: ClassVar[bool] = False
    EXPANDS: ClassVar[bool] = False
    LEARNS: ClassVar[bool] = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Ready for JSON; with "kind"."""

    @classmethod
    @abstractmethod
    def allocate(cls, describe: Mapping[str, Any], rows: int, hidden_size: int) -> Self:
        """Uninitialised, on the current device. ``rows`` is the number of router rows."""

    @abstractmethod
    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed: ...

    def scales(self, index_TK: Tensor, weight_TK: Tensor) -> Scales:
        """For the routing as it was before :meth:`forward`; only where ``INSIDE``."""
        raise NotImplementedError

    def runs(self, bank: Any) -> Any:
        """The bank whose experts the rewritten ids name: the layer's own, unless a rewrite chooses more than slots."""
        return bank


def keep_slots(index_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Slots that are not kept become PAD; with ``renormalise`` each token's weights keep their sum."""
    kept = torch.where(keep_TK, weight_TK, 0.0)
    if renormalise:
        kept = kept * (weight_TK.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1e-20))
    return torch.where(keep_TK, index_TK, PAD), kept.to(weight_TK.dtype)


def rank_of(weight_TK: Tensor) -> Tensor:
    """[T, K]: 0 for a token's heaviest slot, 1 for the next; ties go to the earlier slot."""
    return weight_TK.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
