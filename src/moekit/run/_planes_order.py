"""In what order nested bit planes are read, who makes room for them, and how long that takes (modelled).

The order is D2MoE's hottest-expert-bit-first (arXiv 2504.15299): every expert has a queue of its levels, narrow before
wide, and of all that stand first in a queue the one that most tokens need is read next. Shapes by suffix: E experts,
L levels (0 the base).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moekit.run._policies import Priority
from moekit.run.policy import Key


def plane_order(demand_EL: np.ndarray) -> list[tuple[int, int]]:
    """(expert, level) in the order to read them; ``demand_EL`` tokens run expert e at level l, which needs all below.

    What a level counts for is every token that needs it, those that want more included. Ties go to the lower expert.
    Levels above the highest that is wanted are left out.
    """
    need_EL = demand_EL[:, ::-1].cumsum(1)[:, ::-1]
    top = {e: int(np.flatnonzero(row)[-1]) for e, row in enumerate(demand_EL) if row.any()}
    heads = [(-int(need_EL[e, 0]), e, 0) for e in top]
    heapq.heapify(heads)
    order = []
    while heads:
        _, expert, level = heapq.heappop(heads)
        order.append((expert, level))
        if level < top[expert]:
            heapq.heappush(heads, (-int(need_EL[expert, level + 1]), expert, level + 1))
    return order


def makespan(
    order: Sequence[tuple[int, int]], demand_EL: np.ndarray, read_L: Sequence[float], token_L: Sequence[float]
) -> float:
    """When the last token is computed (modelled): levels are read one after another, ``read_L`` each, and the tokens of
    one are computed, ``token_L`` each, once it and those below are there, in the order of arrival.
    """
    arrived: set[tuple[int, int]] = set()
    read = done = 0.0
    for expert, level in order:
        assert level == 0 or (expert, level - 1) in arrived, "a level was read before the one it adds to"
        arrived.add((expert, level))
        read += read_L[level]
        if tokens := int(demand_EL[expert, level]):
            done = max(done, read) + tokens * token_L[level]
    return max(read, done)


@dataclass(kw_only=True, eq=False)
class WidestFirst(Priority):
    """Evicts the highest levels of the layer that was computed last, then its lower ones, then those of the one before.

    ``levels``: how many an expert has. Ties go to the level that was asked for longest ago.
    """

    pool: Literal["layer", "global"] = "global"
    levels: int
    _layer: int = field(default=-1, init=False)
    _layers: int = field(default=1, init=False)
    _last: dict[Key, int] = field(default_factory=dict, init=False)
    _clock: int = field(default=0, init=False)

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        self._clock += 1
        self._layer, self._layers = layer, max(self._layers, layer + 1)
        self._last.update(dict.fromkeys(((layer, place) for place in experts), self._clock))

    def priorities(self, keys: list[Key]) -> list[tuple[int, int, int]]:
        return [
            (-((key[0] - self._layer - 1) % self._layers), -(key[1] % self.levels), self._last.get(key, 0))
            for key in keys
        ]
