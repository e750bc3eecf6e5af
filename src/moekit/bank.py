"""The fast case of experts: the stacked feed-forward weights of one layer, in one of several storage formats.

Canonical orientation, whatever a family stores: ``gate_up`` [2I, H] with the gate rows first (``up`` alone, [I, H],
where a family has no gate), ``down`` [H, I]; E experts, H hidden size, I intermediate size. Expert e computes
``down @ activation(gate_up @ x + gate_up_bias) + down_bias``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """What happens between the two matrices: [.., 2I] -> [.., I] if gated, else [.., I] -> [.., I].

    ``name`` is "silu_mul" for the plain SwiGLU that fused kernels know, else a description; ``function`` always works
    and takes the gate half first, the up half second.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    gated: bool = True

    def __call__(self, gate_up: Tensor) -> Tensor:
        return self.function(gate_up)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


SILU_MUL = Activation("silu_mul", _silu_mul)


class ExpertWeights(NamedTuple):
    """One expert, dense: ``gate_up`` [2I, H] (or [I, H]), ``down`` [H, I], biases [2I] and [H] or None."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class ExpertBank(ABC):
    """The experts of one layer. Holds data; kernels run it. Never modified in place: every verb returns a new bank."""

    activation: Activation

    @property
    @abstractmethod
    def num_experts(self) -> int: ...

    @property
    @abstractmethod
    def hidden_size(self) -> int: ...

    @property
    @abstractmethod
    def intermediate_size(self) -> int: ...

    @abstractmethod
    def expert(self, index: int) -> ExpertWeights:
        """One expert as dense weights (decoded if stored otherwise)."""

    @abstractmethod
    def select(self, experts: Sequence[int]) -> Self:
        """The named experts, in that order, stored as they were: equal to slicing, bit for bit."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Every stored tensor by name, as it lies in memory and on disk."""

    @property
    def nbytes(self) -> int:
        """Bytes of storage, true in memory and on disk."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())
