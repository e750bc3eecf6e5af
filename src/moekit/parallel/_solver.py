"""What solvers of placement share: the answer, and the objective of keeping consecutive experts of a token together.

``pairs`` float [L-1, E, E]: how often expert i of a layer is followed by j of the next. Every device takes the same
number of experts of every layer. Cost is the number of pairs apart. Shapes by suffix: L layers, E experts, P devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moekit.errors import OptionError


@dataclass(frozen=True, eq=False)
class Solved:
    """``device`` [L, E]; ``cost`` of it; ``bound``: no placement costs less (proven, up to rounding)."""

    device: np.ndarray
    cost: float
    bound: float

    @property
    def exact(self) -> bool:
        return self.cost <= self.bound * (1 + 1e-6) + 1e-9


def apart(pairs: np.ndarray, device: np.ndarray) -> float:
    """Pairs whose two experts lie on different devices."""
    return float(
        sum(
            table[before[:, None] != after[None]].sum()
            for table, (before, after) in zip(pairs, pairwise(device), strict=True)
        )
    )


def per_device(num_experts: int, devices: int) -> int:
    """Experts of a layer on each device; OptionError where they do not divide."""
    if devices < 1 or num_experts % devices:
        raise OptionError(f"{num_experts} experts per layer do not divide over {devices} devices")
    return num_experts // devices


def every_layer(num_experts: int, devices: int) -> Iterator[tuple[int, ...]]:
    """All ways to place one layer evenly, devices named: tuples of E devices in lexicographic order."""
    room = [per_device(num_experts, devices)] * devices
    chosen: list[int] = []

    def go() -> Iterator[tuple[int, ...]]:
        if len(chosen) == num_experts:
            yield tuple(chosen)
            return
        for device in range(devices):
            if room[device]:
                room[device] -= 1
                chosen.append(device)
                yield from go()
                chosen.pop()
                room[device] += 1

    return go()
