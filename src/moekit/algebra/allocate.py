"""One choice per item, least total loss under a byte budget: the multiple-choice knapsack, solved exactly.

Instead of a table over bytes, the states are the totals that nothing beats in both bytes and loss (Nemhauser and
Ullmann, 1969), so byte counts need no rounding and the whole Pareto curve falls out. Where such totals exceed
``limit``, they are thinned to the best one in each of ``limit`` equal ranges of bytes: the budget still holds to the
byte, the loss may then miss the optimum by what one such range per item can buy, and ``exact`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Menu = Sequence[tuple[int, float]]
"""What may be chosen for one item: (bytes, loss) pairs."""


@dataclass(frozen=True)
class Allocation:
    """``choice[i]`` indexes menu i; ``curve`` is every (bytes, loss) total worth having, of all budgets, ascending."""

    choice: tuple[int, ...]
    nbytes: int
    loss: float
    curve: tuple[tuple[int, float], ...]
    exact: bool


@dataclass(frozen=True)
class Frontier:
    """Totals over the first menus that nothing beats: ``nbytes`` ascending, ``loss`` strictly descending.

    ``parent`` is the state of the previous frontier that each came from, ``choice`` what the last menu gave.
    """

    nbytes: np.ndarray
    loss: np.ndarray
    parent: np.ndarray
    choice: np.ndarray
    exact: bool = True


def frontiers(menus: Sequence[Menu], limit: int = 20_000) -> Iterator[Frontier]:
    """The frontier over the first menu, over the first two, and so on."""
    last = Frontier(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    for menu in menus:
        sizes, losses = np.array([m[0] for m in menu], np.int64), np.array([m[1] for m in menu], float)
        nbytes = (last.nbytes[:, None] + sizes).ravel()
        loss = (last.loss[:, None] + losses).ravel()
        kept = _undominated(nbytes, loss)
        exact = last.exact and len(kept) <= limit
        if len(kept) > limit:
            kept = _thin(nbytes, kept, limit)
        last = Frontier(nbytes[kept], loss[kept], kept // len(menu), kept % len(menu), exact)
        yield last


def trace(path: Sequence[Frontier], state: int) -> tuple[int, ...]:
    """The choices, one per menu, that lead to a state of the last frontier of ``path``."""
    choices = []
    for frontier in reversed(path):
        choices.append(int(frontier.choice[state]))
        state = int(frontier.parent[state])
    return tuple(reversed(choices))


def allocate(menus: Sequence[Menu], budget: int, limit: int = 20_000) -> Allocation | None:
    """The choice of least total loss whose bytes are at most ``budget``; fewer bytes break ties. None if none fits."""
    path = list(frontiers(menus, limit))
    if not path:
        return Allocation((), 0, 0.0, ((0, 0.0),), True)
    last = path[-1]
    state = int(np.searchsorted(last.nbytes, budget, side="right")) - 1
    if state < 0:
        return None
    curve = tuple(zip(last.nbytes.tolist(), last.loss.tolist(), strict=True))
    return Allocation(trace(path, state), int(last.nbytes[state]), float(last.loss[state]), curve, last.exact)


def _undominated(nbytes: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the totals that no other beats, by ascending bytes; the first of equals."""
    order = np.lexsort((loss, nbytes))
    lowest = np.minimum.accumulate(loss[order])
    better = np.ones(len(order), bool)
    better[1:] = loss[order][1:] < lowest[:-1]
    return order[better]


def _thin(nbytes: np.ndarray, kept: np.ndarray, limit: int) -> np.ndarray:
    """The cheapest state, and of each of ``limit - 1`` equal byte ranges the one of least loss."""
    sizes = nbytes[kept]
    bins = (sizes - sizes[0]) * (limit - 1) // (sizes[-1] - sizes[0] + 1)
    last_of_bin = np.append(bins[1:] != bins[:-1], True)
    last_of_bin[0] = True
    return kept[last_of_bin]
