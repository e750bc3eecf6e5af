"""Structured forms that experts' weights take while they train: what is trained, and the weights it stands for.

A form is for one matrix of all experts of a layer, W [E, R, K] in canonical orientation: gate, up or down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moekit.errors import OptionError

_EPS = 1e-5
"""Added to the mean magnitude, as BitNet b1.58 does, so that a matrix of zeros has a scale."""


class Form(nn.Module, ABC):
    """``hold`` splits weights into what is trained (and may keep buffers), ``forward`` makes weights of that again."""

    @abstractmethod
    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def forward(self, *held: Tensor) -> Tensor: ...


def ternary(weight_ERK: Tensor, eps: float = _EPS) -> Tensor:
    """a * clip(round(W / a), -1, 1) with a = mean|W| of each expert's matrix (BitNet b1.58, arXiv 2402.17764).

    a is rounded to bfloat16, as it is stored, so that what is trained is what is written.
    """
    scale = (weight_ERK.abs().mean(dim=(1, 2), keepdim=True) + eps).to(torch.bfloat16).to(weight_ERK.dtype)
    return (weight_ERK / scale).round().clamp(-1, 1) * scale


class Ternary(Form):
    """Trained at full precision, used as -a, 0 and a; the gradient passes the rounding as if it were not there."""

    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]:
        return (weight_ERK.clone(),)

    def forward(self, *held: Tensor) -> Tensor:
        (weight,) = held
        return weight + (ternary(weight) - weight).detach()


class LowRankSparse(Form):
    """W = L R + S: truncated SVD with evenly split singular values, and a remainder of whole rows that shrinks.

    Source: LoSparse (arXiv 2306.11222) as in MC-SMoE (arXiv 2310.01334). ``keep`` is bool [E, R]: rows of S that are
    left; :meth:`score` after each backward and :meth:`prune` after each step shrink it.
    """

    keep: Tensor
    importance: Tensor

    def __init__(self, rank: int, beta: float = 0.85) -> None:
        super().__init__()
        self.rank, self.beta = rank, beta

    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]:
        most = min(weight_ERK.shape[1:])
        if not 1 <= self.rank <= most:
            raise OptionError(
                f"rank={self.rank} is not possible: matrices {list(weight_ERK.shape[1:])} have 1 to {most}"
            )
        left, values, right = torch.linalg.svd(weight_ERK.float(), full_matrices=False)
        root = values[:, : self.rank].sqrt()
        left, right = left[:, :, : self.rank] * root[:, None], root[:, :, None] * right[:, : self.rank]
        self.register_buffer("keep", torch.ones(weight_ERK.shape[:2], dtype=torch.bool, device=weight_ERK.device))
        self.register_buffer("importance", torch.zeros(weight_ERK.shape[:2], device=weight_ERK.device))
        rest = weight_ERK.float() - left @ right
        return tuple(held.to(weight_ERK.dtype).contiguous() for held in (left, right, rest))

    def forward(self, *held: Tensor) -> Tensor:
        left, right, rest = held
        return left @ right + rest * self.keep[:, :, None]

    @torch.no_grad()
    def score(self, rest: Tensor, gradient: Tensor) -> None:
        """Importance of a row: the mean of |w * dL/dw|, smoothed over steps with ``beta``."""
        self.importance.mul_(self.beta).add_((rest * gradient).abs().mean(2), alpha=1 - self.beta)


class Scaled(Form):
    """The weights stay; what is trained is a factor for every row, 1 at first."""

    weight: Tensor

    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]:
        self.register_buffer("weight", weight_ERK.detach().clone())
        return (weight_ERK.new_ones(*weight_ERK.shape[:2], 1),)

    def forward(self, *held: Tensor) -> Tensor:
        return self.weight * held[0]


class Tied(Form):
    """Row e of the layer uses stored matrix ``slots[e]``; gradients of rows that share one add up.

    The matrix of a shared slot is that of its first row.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        super().__init__()
        used = sorted(set(slots))
        if used != list(range(len(used))):
            raise OptionError(f"slots {list(slots)} must use every number from 0 to {max(slots, default=0)}")
        self.slots = list(slots)

    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]:
        if len(weight_ERK) != len(self.slots):
            raise OptionError(f"{len(self.slots)} slots for {len(weight_ERK)} experts: give one for each")
        first = [self.slots.index(slot) for slot in range(max(self.slots) + 1)]
        return (weight_ERK[first].clone(),)

    def forward(self, *held: Tensor) -> Tensor:
        return held[0][self.slots]


class Frozen(Form):
    """The named experts stay bit for bit; only the others are trained (no decay or momentum can move them)."""

    weight: Tensor

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__()
        self.experts = sorted(set(experts))

    def hold(self, weight_ERK: Tensor) -> tuple[Tensor, ...]:
        count = len(weight_ERK)
        wrong = [e for e in self.experts if not 0 <= e < count]
        if wrong or len(self.experts) == count:
            what = f"no expert {wrong[0]}" if wrong else "nothing left to train"
            raise OptionError(f"freezing experts {self.experts}: {what}; the layer has experts 0 to {count - 1}")
        self.free = [e for e in range(count) if e not in self.experts]
        self.register_buffer("weight", weight_ERK.detach().clone())
        return (weight_ERK[self.free].clone(),)

    def forward(self, *held: Tensor) -> Tensor:
        index = torch.tensor(self.free, device=held[0].device)
        return self.weight.index_copy(0, index, held[0])
