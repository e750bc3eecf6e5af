"""Weights that come while a layer runs: what a kernel asks for before it reads an expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np


class Arrivals(Protocol):
    """Called with experts in the order in which they are computed; returns when their weights may be read.

    They stay until the next call. ``most`` is how many can be there at once, at least one.
    """

    @property
    def most(self) -> int: ...

    def __call__(self, experts: Sequence[int]) -> None: ...


def windows(start_E: np.ndarray, size: int, arrivals: Arrivals | None) -> Iterator[tuple[int, int]]:
    """Windows of ``size`` sorted pairs, in parts of as many experts as can be there at once, yielded when they are.

    ``start_E`` [E + 1]: where each expert's pairs begin. Windows begin at multiples of ``size`` whatever arrives when,
    because bits depend on which rows are multiplied together.
    """
    for low in range(0, int(start_E[-1]), size):
        high = min(low + size, int(start_E[-1]))
        if arrivals is None:
            yield low, high
            continue
        begins, ends = start_E[:-1].clip(low, high), start_E[1:].clip(low, high)
        experts = np.flatnonzero(ends > begins)
        for first in range(0, len(experts), arrivals.most):
            part = experts[first : first + arrivals.most]
            arrivals(part.tolist())
            yield int(begins[part[0]]), int(ends[part[-1]])
