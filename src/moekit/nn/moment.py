"""When in a run something is, and what chance does there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError


@dataclass(frozen=True)
class Moment:
    """One step of a run. What is drawn at random depends on this and on nothing else, so that any step can be replayed.

    ``stream`` tells apart what is drawn for different purposes at the same step; ``number`` is the module's among the
    ``of`` modules that one schedule moves.
    """

    step: int
    steps: int
    seed: int = 0
    stream: int = 0
    number: int = 0
    of: int = 1

    def share(self, begin: float, until: float) -> float:
        """How much of the stretch from ``begin`` to ``until`` (shares of the run) is over: 0 to 1."""
        done = self.step / self.steps
        return min(1.0, max(0.0, (done - begin) / (until - begin))) if until > begin else float(done >= until)

    def generator(self, *, own: bool = False) -> torch.Generator:
        """The same for all modules that one schedule moves, or each its ``own``."""
        mixed = ((self.seed * 1_000_003 + self.step) * 1_000_003 + self.stream) * 1_009
        return torch.Generator().manual_seed(mixed % 2**63 + (1 + self.number if own else 0))


def chances_of(count: int, chances: Sequence[float] | None, what: str) -> Tensor:
    """float32 [count]: how likely each of so many ``what`` is drawn, in any unit; equal where nothing is told.

    Raises :class:`OptionError` for another number of them, a negative one, or nothing to draw.
    """
    told = [1.0] * count if chances is None else list(chances)
    if not count or len(told) != count or min(told) < 0 or not sum(told) > 0:
        raise OptionError(f"{count} {what} need as many chances, none negative, got {told}")
    return torch.tensor(told, dtype=torch.float32)
