"""One small class per kind of statistic: fed with views of one layer, batch after batch, it gives one array.

Sums are taken in float64 whatever the model computes in. A figure the model cannot give (logits of a router that has
none, a residual stream that cannot be told) stays out of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from moekit.profile._reservoir import Reservoir
from moekit.profile._view import Cells, View
from moekit.profile.schema import HALVES, PHASES


@dataclass(frozen=True)
class Room:
    """Sizes a statistic needs to know before it begins."""

    num_experts: int
    num_domains: int
    num_previous: int = 0
    num_traced: int = 0
    sample: Reservoir | None = None

    @property
    def cells(self) -> tuple[int, int, int]:
        return HALVES, self.num_domains, len(PHASES)


@runtime_checkable
class Statistic(Protocol):
    """``observe`` is called once per batch; ``result`` once, after the last."""

    def observe(self, view: View) -> None: ...

    def result(self) -> np.ndarray | None:
        """The array, or None where nothing could be observed."""
        ...


class SlotSum:
    """Sums a figure of each (token, slot) pair over tokens, per cell and expert: [half, domain, phase, E]."""

    def __init__(self, room: Room, figure_TK: Callable[[View], Tensor | None]) -> None:
        self._room, self._figure = room, figure_TK
        self._sum = torch.zeros(Cells.count(room.num_domains) * room.num_experts, dtype=torch.float64)
        self._absent = False

    def observe(self, view: View) -> None:
        figure = self._figure(view)
        if figure is None:
            self._absent = True
            return
        key_TK = view.cell_T[:, None] * self._room.num_experts + view.expert_TK
        self._sum.index_add_(0, key_TK[view.used_TK].cpu(), figure[view.used_TK].double().cpu())

    def result(self) -> np.ndarray | None:
        return None if self._absent else self._sum.view(*self._room.cells, self._room.num_experts).numpy()


class TokenSum:
    """Sums a figure of each token, [T] or [T, E], per cell: [half, domain, phase] or [half, domain, phase, E]."""

    def __init__(self, room: Room, figure: Callable[[View], Tensor | None], width: int | None = None) -> None:
        self._room, self._figure, self._width = room, figure, width
        shape = (Cells.count(room.num_domains), *(() if width is None else (width,)))
        self._sum, self._absent = torch.zeros(shape, dtype=torch.float64), False

    def observe(self, view: View) -> None:
        figure = self._figure(view)
        if figure is None:
            self._absent = True
            return
        self._sum.index_add_(0, view.cell_T.cpu(), figure.double().cpu())

    def result(self) -> np.ndarray | None:
        shape = self._room.cells + (() if self._width is None else (self._width,))
        return None if self._absent else self._sum.view(shape).numpy()


class Largest:
    """The largest figure of any (token, slot) pair, per expert: [E]; 0 for an expert that no token chose."""

    def __init__(self, room: Room, figure_TK: Callable[[View], Tensor]) -> None:
        self._figure, self._most = figure_TK, torch.zeros(room.num_experts, dtype=torch.float64)

    def observe(self, view: View) -> None:
        used = view.used_TK
        figure = self._figure(view)[used].double().cpu()
        self._most.scatter_reduce_(0, view.expert_TK[used].cpu(), figure, "amax")

    def result(self) -> np.ndarray:
        return self._most.numpy()


class LargestShared:
    """The largest figure of any token, per shared module: [M]."""

    def __init__(self) -> None:
        self._most: np.ndarray | None = None

    def observe(self, view: View) -> None:
        if view.shared_T:
            most = np.array([float(figure_T.max()) for figure_T in view.shared_T])
            self._most = most if self._most is None else np.maximum(self._most, most)

    def result(self) -> np.ndarray | None:
        return self._most


class Product:
    """Sums the outer product of two figures of each token: [A, B] from [T, A] and [T, B]."""

    def __init__(self, pair: Callable[[View], tuple[Tensor, Tensor] | None]) -> None:
        self._pair = pair
        self._sum: Tensor | None = None

    def observe(self, view: View) -> None:
        if (pair := self._pair(view)) is not None:
            product = (pair[0].double().T @ pair[1].double()).cpu()
            self._sum = product if self._sum is None else self._sum.add_(product)

    def result(self) -> np.ndarray | None:
        return None if self._sum is None else self._sum.numpy()


class ExpertMoments:
    """Second moments of the inputs of each expert's own tokens: [E, H, H]. Large; on request only."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._sum: Tensor | None = None

    def observe(self, view: View) -> None:
        if self._sum is None:
            width = view.x_TH.shape[1]
            self._sum = torch.zeros(self._room.num_experts, width, width, dtype=torch.float64)
        for expert in view.expert_TK[view.used_TK].unique().tolist():
            x = view.x_TH[view.chosen_TE[:, expert] > 0].double()
            self._sum[expert] += (x.T @ x).cpu()

    def result(self) -> np.ndarray | None:
        return None if self._sum is None else self._sum.numpy()


class Traced:
    """Keeps a figure [T, width] of the traced tokens, each at the row that was set aside for it."""

    def __init__(self, rows: int, figure: Callable[[View], Tensor], fill: float, kind: type) -> None:
        self._rows, self._figure, self._fill, self._kind = rows, figure, fill, kind
        self._kept: np.ndarray | None = None

    def observe(self, view: View) -> None:
        position, row = view.cells.trace
        if not len(position):
            return
        seen = self._figure(view)[_among_real(view.cells.cell, position)].cpu().numpy()
        if self._kept is None:
            self._kept = np.full((self._rows, seen.shape[1]), self._fill, dtype=self._kind)
        self._kept[np.asarray(row)] = seen

    def result(self) -> np.ndarray | None:
        return self._kept


class Sampled:
    """Keeps a figure [T] or [T, width] of the tokens in the layer's sample, at the place each was given."""

    def __init__(self, room: Room, figure: Callable[[View], Tensor | np.ndarray | None], kind: type) -> None:
        self._room, self._figure, self._kind = room, figure, kind
        self._kept: np.ndarray | None = None

    def observe(self, view: View) -> None:
        position, place = view.sampled
        if not len(position) or (figure := self._figure(view)) is None:
            return
        seen = figure[position] if isinstance(figure, np.ndarray) else _array(figure[torch.from_numpy(position)])
        kept = np.zeros((0, *seen.shape[1:]), dtype=self._kind) if self._kept is None else self._kept
        if (needed := int(place.max()) + 1) > len(kept):
            more = np.zeros((max(needed - len(kept), len(kept) // 4), *kept.shape[1:]), dtype=self._kind)
            kept = np.concatenate([kept, more])
        kept[place] = seen
        self._kept = kept

    def result(self) -> np.ndarray | None:
        kept, self._kept = self._kept, None  # not twice in memory: samples are wide
        return None if kept is None or self._room.sample is None else kept[self._room.sample.order]


def _array(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def _among_real(cell: Tensor, position: object) -> Tensor:
    """Positions in the batch as positions among its real tokens."""
    return ((cell >= 0).cumsum(0) - 1)[torch.as_tensor(position)]
