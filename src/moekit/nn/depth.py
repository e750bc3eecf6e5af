"""Numbers that differ from layer to layer by a rule: how many experts each has, how many a token uses.

DynaMoE (arXiv 2603.01697), its six schedules over depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import OptionError
from .parts import make


class Depth:
    """Whole numbers between ``low`` and ``high``, one per layer; with ``total`` scaled so that they sum to it."""

    def __init__(self, layers: int, *, low: int, high: int, total: int | None = None) -> None:
        if not 1 <= low <= high:
            raise OptionError(f"numbers per layer from low={low} to high={high}: give 1 <= low <= high")
        if total is not None and total < layers:
            raise OptionError(f"total={total} over {layers} layers: each needs one at least")
        self.layers, self.low, self.high, self.total = layers, low, high, total

    def at(self, depth: float) -> float:
        """The share of the way from low to high at a depth of 0 to 1."""
        raise NotImplementedError

    def counts(self) -> list[int]:
        """One number per layer, 1 at least."""
        depths = [layer / max(1, self.layers - 1) for layer in range(self.layers)]
        wanted = [self.low + (self.high - self.low) * self.at(depth) for depth in depths]
        if self.total is None:
            return [max(1, math.floor(value + 0.5)) for value in wanted]
        return shared_out(wanted, self.total)


class Uniform(Depth):
    """Half way everywhere."""

    def at(self, depth: float) -> float:
        return 0.5


class Ascending(Depth):
    """Evenly from low to high."""

    def at(self, depth: float) -> float:
        return depth


class Descending(Depth):
    """Evenly from high to low."""

    def at(self, depth: float) -> float:
        return 1 - depth


class Pyramid(Depth):
    """High in the middle, low at both ends."""

    def at(self, depth: float) -> float:
        return 1 - abs(2 * depth - 1)


class Valley(Depth):
    """Low in the middle, high at both ends (the paper's pyramid-down)."""

    def at(self, depth: float) -> float:
        return abs(2 * depth - 1)


class Wave(Depth):
    """A sine around the middle, ``periods`` of it."""

    def __init__(self, layers: int, *, low: int, high: int, total: int | None = None, periods: float = 1.0) -> None:
        super().__init__(layers, low=low, high=high, total=total)
        self.periods = periods

    def at(self, depth: float) -> float:
        return 0.5 + 0.5 * math.sin(2 * math.pi * self.periods * depth)


DEPTHS: dict[str, Callable[..., Depth]] = {
    "uniform": Uniform,
    "ascending": Ascending,
    "descending": Descending,
    "pyramid": Pyramid,
    "valley": Valley,
    "wave": Wave,
}


def per_layer(spec: dict, layers: int) -> list[int]:
    """The numbers of a table such as ``{kind = "descending", low = 8, high = 24}``.

    Raises:
        OptionError: an unknown kind, bounds that are none, or a total that does not go round.
    """
    return make("numbers per layer", DEPTHS, spec, layers).counts()


def shared_out(wanted: Sequence[float], total: int) -> list[int]:
    """Whole numbers from 1 on that sum to ``total``, 1 each and the rest in proportion: largest remainders first."""
    spare = total - len(wanted)
    exact = [spare * value / sum(wanted) for value in wanted]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(wanted)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: spare - sum(counts)]:
        counts[i] += 1
    return [1 + count for count in counts]
