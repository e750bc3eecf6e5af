"""What a store keeps in memory comes from here, and this is what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Tier(Protocol):
    """The experts of one layer on the slow tier, and the places they are brought to: of ``num_experts``.

    ``charge``: memory that each place takes at most; ``stored_bytes``: what is read for it; ``unit``: the most that one
    expert takes, in all its places. :meth:`keep` and
    :meth:`drop` are called under the store's lock, :meth:`fill` from its threads, between the two.
    """

    name: str
    num_experts: int
    charge: Sequence[int]
    stored_bytes: Sequence[int]

    @property
    def unit(self) -> int: ...
    def keep(self, expert: int) -> None: ...
    def drop(self, expert: int) -> None: ...
    def fill(self, expert: int) -> None: ...


class Whole:
    """What a tier keeps is its experts, one place each."""

    num_experts: int
    charge: Sequence[int]

    @property
    def unit(self) -> int:
        """The most memory that one expert of a kernel takes, all places together that it needs."""
        return max(self.charge)

    def wanted(self, index_TK: Tensor) -> list[int]:
        """The places that a routing needs, the most wanted first."""
        return used(index_TK, self.num_experts)

    def places(self, experts: Sequence[int]) -> Sequence[int]:
        """Those that must be filled before a kernel reads ``experts``."""
        return experts

    def foreseen(self, experts: Sequence[int]) -> Sequence[int]:
        """Those to read ahead where a router is expected to choose ``experts``."""
        return experts

    def chosen(self, index_TK: Tensor) -> Tensor:
        """A routing as kernels have it, by expert."""
        return index_TK

    def scored(self, score_E: Sequence[float]) -> Sequence[float]:
        """A router's scores of experts, by place."""
        return score_E


def used(index_TK: Tensor, num_experts: int) -> list[int]:
    """The distinct experts of a routing, in order."""
    experts = torch.unique(index_TK)
    return experts[(experts >= 0) & (experts < num_experts)].tolist()


@dataclass
class Counters:
    """``requests``: experts asked for, one for each distinct expert of a batch at a layer; of these ``hits`` were
    there, ``late`` were being prefetched and had to be waited for, ``misses`` had to be fetched. Bytes are bytes read
    from the slow tier; ``useless_bytes`` of the prefetched ones were thrown out unused. ``stall_seconds``: time that
    computing stood still; ``read_seconds``: time that reading threads spent reading, all together.
    """

    requests: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    evictions: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    useless_bytes: int = 0
    stall_seconds: float = 0.0
    read_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of requests that found their expert there; 1 where nothing was asked for."""
        return self.hits / self.requests if self.requests else 1.0
