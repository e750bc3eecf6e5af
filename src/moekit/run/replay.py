"""Replaying a routing trace through a cache: what would have hit, what would have been read, and what for nothing.

Shapes by suffix: T tokens, L MoE layers, E experts, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from moekit.errors import OptionError
from moekit.profile import RoutingTrace
from moekit.profile.trace import Request
from moekit.run._policies_known import Belady
from moekit.run.policy import CachePolicy, Key
from moekit.run.predict import Predictor, Signal

Phase = Literal["prefill", "decode"]


@dataclass(kw_only=True)
class Counters:
    """What a cache did. One lookup is one distinct expert of one request (a batch of tokens at one layer).

    ``hits`` includes those owed to a prefetch (``prefetch_hits``). Bytes: ``demand`` for misses, ``prefetch`` for what
    was read ahead, of which ``useless`` was never asked for before it went. ``bypassed`` misses were served without
    being kept. ``layer_hits`` and ``layer_lookups`` [L].
    """

    lookups: int = 0
    hits: int = 0
    prefetch_hits: int = 0
    bypassed: int = 0
    prefetches: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    useless_prefetch_bytes: int = 0
    tokens: int = 0
    layer_hits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    layer_lookups: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def misses(self) -> int:
        return self.lookups - self.hits

    @property
    def hit_rate(self) -> float:
        """Share of lookups that found their expert; 1 where there were none."""
        return self.hits / self.lookups if self.lookups else 1.0

    @property
    def bytes(self) -> int:
        return self.demand_bytes + self.prefetch_bytes


def replay(
    trace: RoutingTrace,
    policy: CachePolicy,
    capacity: int,
    predictor: Predictor | None = None,
    *,
    width: int = 0,
    depth: int | None = None,
    horizon: int = 1,
    expert_bytes: int | Sequence[int] = 1,
    phase: Phase | None = None,
    missed: Callable[[Request, Sequence[Key]], None] = lambda request, keys: None,
) -> Counters:
    """Drive ``policy`` with a trace through an empty cache of ``capacity`` experts.

    All experts of a request are pinned until it is computed. Before the first layer and after every request, the first
    ``depth`` (default ``width``) that ``predictor`` ranks for each of the next ``horizon`` layers are read ahead,
    nearest layer first, at most ``width`` of them: as many as the link carries while one layer computes, so that all
    arrive. None of them makes way for another. ``expert_bytes`` may differ by layer. Everything is replayed; ``phase``
    says what is counted (default all). ``missed`` is told of each counted request that had misses, and of which.

    Raises:
        OptionError: the cache is smaller than the largest request, or a number is negative.
    """
    largest = max((len(request.experts) for request in trace.requests), default=0)
    if capacity < largest or width < 0 or horizon < 1:
        raise OptionError(
            f"a cache of {capacity} experts, {width} read ahead over {horizon} layers: expected room for the "
            f"{largest} experts of the largest request, a width of 0 or more and a horizon of 1 or more"
        )
    return _Replay(
        trace=trace,
        policy=policy,
        capacity=capacity,
        predictor=predictor if width else None,
        width=width,
        depth=width if depth is None else depth,
        horizon=horizon,
        sizes=[expert_bytes] * trace.num_layers if isinstance(expert_bytes, int) else expert_bytes,
        phase=phase,
        missed=missed,
    ).run()


def bound(
    trace: RoutingTrace,
    capacity: int,
    *,
    expert_bytes: int | Sequence[int] = 1,
    phase: Phase | None = None,
) -> Counters:
    """Belady's counters on a trace: no policy that keeps what it reads and reads nothing ahead can hit more."""
    return replay(trace, Belady(trace.requests), capacity, expert_bytes=expert_bytes, phase=phase)


@dataclass(kw_only=True)
class _Replay:
    trace: RoutingTrace
    policy: CachePolicy
    capacity: int
    predictor: Predictor | None
    width: int
    depth: int
    horizon: int
    sizes: Sequence[int]
    phase: Phase | None
    missed: Callable[[Request, Sequence[Key]], None]
    counts: bool = True  # whether the phase of this step is counted
    resident: set[Key] = field(default_factory=set)
    ahead: dict[Key, bool] = field(default_factory=dict)
    """Read ahead and not yet asked for -> whether its reading was counted."""

    def __post_init__(self) -> None:
        zeros = np.zeros(self.trace.num_layers, np.int64)
        self.counters = Counters(layer_hits=zeros, layer_lookups=zeros.copy())
        self.scores_SLE = _mean_scores(self.trace)

    def run(self) -> Counters:
        sequence, step = -1, -1
        for request in self.trace.requests:
            if request.layer == 0:
                step += 1
                first = int(self.trace.sequence[request.start])
                if first != sequence:
                    sequence = first
                    self._reset()
                self.counts = self._counts(request)
                self.counters.tokens += self.counts * (request.stop - request.start)
                self._read_ahead(request, -1, set())
            self._serve(request, None if self.scores_SLE is None else self.scores_SLE[step, request.layer].tolist())
        for key, counted in self.ahead.items():
            self.counters.useless_prefetch_bytes += counted * self.sizes[key[0]]
        return self.counters

    def _reset(self) -> None:
        self.policy.reset()
        if self.predictor is not None:
            self.predictor.reset()

    def _counts(self, request: Request) -> bool:
        return self.phase is None or (self.phase == "decode") == bool(self.trace.decode[request.start])

    def _serve(self, request: Request, scores: Sequence[float] | None) -> None:
        layer, resident = request.layer, self.resident
        keys = [(layer, expert) for expert in request.experts]
        self.policy.routed(layer, request.experts, scores)
        missing = [key for key in keys if key not in resident]
        for key in keys:
            if self.ahead.pop(key, None) is not None:
                self.counters.prefetch_hits += self.counts
        pinned = set(keys)
        for key in missing:
            if not self._admit(key, pinned):
                self.counters.bypassed += self.counts
        if self.counts:
            self.counters.lookups += len(keys)
            self.counters.hits += len(keys) - len(missing)
            self.counters.demand_bytes += len(missing) * self.sizes[layer]
            self.counters.layer_lookups[layer] += len(keys)
            self.counters.layer_hits[layer] += len(keys) - len(missing)
            if missing:
                self.missed(request, missing)
        if self.predictor is not None:
            self.predictor.observe(layer, request.experts)
            self._read_ahead(request, layer, pinned)

    def _admit(self, key: Key, pinned: set[Key]) -> bool:
        if len(self.resident) >= self.capacity:
            gone = self.policy.victim(self.resident, pinned, key)
            if gone is None:
                return False
            assert gone not in pinned, "a policy evicted what was pinned"
            self.resident.remove(gone)
            self.policy.evicted(gone)
            self.counters.useless_prefetch_bytes += self.ahead.pop(gone, False) * self.sizes[gone[0]]
        self.resident.add(key)
        self.policy.admitted(key)
        return True

    def _read_ahead(self, request: Request, layer: int, pinned: set[Key]) -> None:
        if self.predictor is None:
            return
        left = self.width
        for ahead, ranking in enumerate(self.predictor.predict(layer, self._signal(request, layer), self.horizon), 1):
            for expert, _ in ranking[: self.depth]:
                key = (layer + ahead, expert)
                if left == 0:
                    return
                known = key in self.resident
                if not known and not self._admit(key, pinned):
                    return
                pinned.add(key)
                if not known:
                    left -= 1
                    self.ahead[key] = self.counts
                    self.counters.prefetches += self.counts
                    self.counters.prefetch_bytes += self.counts * self.sizes[key[0]]

    def _signal(self, request: Request, layer: int) -> Signal:
        trace, own = self.trace, slice(request.start, request.stop)
        inputs = None if trace.inputs is None or layer < 0 else torch.from_numpy(trace.inputs[own, layer]).float()
        return Signal(
            x_TH=inputs,
            token=None if trace.token is None else trace.token[own],
            routing={passed: trace.expert[own, passed] for passed in range(layer + 1)},
            sequence=trace.sequence[own],
        )


def _mean_scores(trace: RoutingTrace) -> np.ndarray | None:
    """Float32 [S, L, E]: router probabilities, mean over the tokens of each step."""
    if trace.scores is None or not len(trace):
        return None
    begins = np.flatnonzero(np.diff(trace.step, prepend=trace.step[0] - 1))
    sums = np.add.reduceat(trace.scores.astype(np.float32), begins, axis=0)
    return sums / np.diff(begins, append=len(trace))[:, None, None]
