"""Policies that know something beforehand: all that will be asked for (the bound), or what is asked for most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from moekit.profile import RoutingTrace
from moekit.profile.trace import Request
from moekit.run.policy import CachePolicy, Key

NEVER = 1 << 60


@dataclass(eq=False)
class Belady(CachePolicy):
    """Evicts what is asked for again last; the bound of every cache that is told its requests one after the other.

    ``future`` is the reference string it will be driven with. With all experts of a request pinned while it is served,
    no policy that keeps what it reads has fewer misses.

    Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
    """

    future: Sequence[Request]
    _at: int = field(default=-1, init=False)
    _next: dict[Key, int] = field(default_factory=dict, init=False)
    _follows: list[tuple[int, ...]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        following: dict[Key, int] = {}
        for at in range(len(self.future) - 1, -1, -1):
            request = self.future[at]
            keys = [(request.layer, expert) for expert in request.experts]
            self._follows.append(tuple(following.get(key, NEVER) for key in keys))
            following.update(dict.fromkeys(keys, at))
        self._follows.reverse()
        self._next = following

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        self._at += 1
        request = self.future[self._at]
        assert (request.layer, request.experts) == (layer, tuple(experts)), "driven with another future"
        for expert, follows in zip(request.experts, self._follows[self._at], strict=True):
            self._next[layer, expert] = follows

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        candidates = [key for key in resident if key not in pinned]
        following = [self._next.get(key, NEVER) for key in candidates]
        return max(zip(following, candidates, strict=True))[1] if candidates else None


class Pinned(CachePolicy):
    """Experts of ``hot`` go last: only where nothing else may. Everything else is up to ``inner``."""

    def __init__(self, inner: CachePolicy, hot: Collection[Key]) -> None:
        self.inner, self.hot = inner, frozenset(hot)

    def reset(self) -> None:
        self.inner.reset()

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        self.inner.routed(layer, experts, scores)

    def admitted(self, key: Key) -> None:
        self.inner.admitted(key)

    def evicted(self, key: Key) -> None:
        self.inner.evicted(key)

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        found = self.inner.victim(resident, {*pinned, *self.hot.intersection(resident)}, incoming)
        return self.inner.victim(resident, pinned, incoming) if found is None else found


def hottest(trace: RoutingTrace, count: int) -> list[Key]:
    """The ``count`` experts that most steps of a trace ask for, the most wanted first; ties to the lower key."""
    asked: defaultdict[Key, int] = defaultdict(int)
    for request in trace.requests:
        for expert in request.experts:
            asked[request.layer, expert] += 1
    return sorted(asked, key=lambda key: (-asked[key], key))[:count]


def demand(trace: RoutingTrace) -> np.ndarray:
    """Float [L, E]: in what share of a trace's steps each expert is asked for."""
    share_LE = np.zeros((trace.num_layers, max(trace.num_experts)))
    for request in trace.requests:
        share_LE[request.layer, list(request.experts)] += 1
    return share_LE / max(len(trace.requests) / trace.num_layers, 1)
