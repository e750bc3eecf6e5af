"""Which tokens of a layer are its sample: a rule that needs no order, and a reservoir that follows it batch by batch.

Every token has a priority that depends on nothing but its text, its place and the seed. A sample is a set of smallest
priorities, so the sample of joined texts can be chosen from the samples of the parts.
Shapes by suffix: N tokens, K slots, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quota:
    """``tokens`` of each layer, domains in turn, and ``balanced`` times an even share of them for every expert."""

    tokens: int
    balanced: float = 0.0

    def each(self, num_experts: int, top_k: int) -> int:
        """Tokens every expert should have: balanced x K / E x tokens, rounded up; 0 without balance.

        The target of EAQuant's calibration, with the sample in place of one sequence (arXiv 2506.13329).
        """
        return math.ceil(self.balanced * top_k / max(num_experts, 1) * self.tokens)

    def most(self, num_experts: int, top_k: int) -> int:
        """Tokens a sample can come to, when no two experts share any."""
        return self.tokens + num_experts * self.each(num_experts, top_k)


def pick(priority_N: np.ndarray, domain_N: np.ndarray, expert_NK: np.ndarray, *, tokens: int, each: int) -> np.ndarray:
    """Positions of the sampled tokens: the ``tokens`` first, in turn over the domains and by priority within one, then
    the ``each`` first of every expert that are not among them, by priority.

    An expert's tokens are ranked by the same priorities as all tokens, so that one token serves several experts and an
    even router needs hardly more than ``tokens``.
    """
    base = np.lexsort((priority_N, _rank_within(domain_N, priority_N)))[:tokens]
    if not each:
        return base
    token, slot = np.nonzero(expert_NK >= 0)
    own = _rank_within(expert_NK[token, slot], priority_N[token]) < each
    extra = np.setdiff1d(token[own], base)
    return np.concatenate([base, extra[np.argsort(priority_N[extra], kind="stable")]])


def _rank_within(group_N: np.ndarray, priority_N: np.ndarray) -> np.ndarray:
    """How many members of its own group come before each: int64."""
    order = np.lexsort((priority_N, group_N))
    ordered = group_N[order]
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return rank


class Reservoir:
    """The sample of one layer as tokens pass. Each token that is kept has a place, which is given on when it leaves."""

    def __init__(self, tokens: int, each: int) -> None:
        self._tokens, self._each = tokens, each
        self._seen: tuple[np.ndarray, ...] = ()
        self._place = self._free = np.zeros(0, dtype=np.int64)
        self._size = 0

    def admit(
        self, priority_N: np.ndarray, domain_N: np.ndarray, expert_NK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(position among these, place) of the tokens that join; who leaves makes room for them."""
        new = (priority_N, domain_N, expert_NK)
        joined = tuple(map(np.concatenate, zip(self._seen, new, strict=True))) if self._seen else new
        kept, before = pick(*joined, tokens=self._tokens, each=self._each), len(self._place)
        entering = np.sort(kept[kept >= before])
        given = self._vacant(np.setdiff1d(np.arange(before), kept), len(entering))
        place = np.concatenate([self._place, np.zeros(len(priority_N), dtype=np.int64)])
        place[entering] = given
        self._place, self._seen = place[kept], tuple(array[kept] for array in joined)
        return entering - before, given

    def _vacant(self, leaving: np.ndarray, count: int) -> np.ndarray:
        spare = np.concatenate([self._free, self._place[leaving]])
        fresh = max(0, count - len(spare))
        spare = np.concatenate([spare, np.arange(self._size, self._size + fresh)])
        self._size += fresh
        self._free = spare[count:]
        return spare[:count]

    @property
    def order(self) -> np.ndarray:
        """The places, in the order of the sample."""
        return self._place
