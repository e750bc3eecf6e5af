"""Priorities that fade or weigh: decayed frequency, averaged router scores, and several terms at once."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moekit.errors import OptionError
from moekit.run._policies import Priority
from moekit.run.policy import Key


@dataclass(kw_only=True, eq=False)
class DecayedLFU(Priority):
    """Uses since admission, all multiplied by ``decay`` every ``every`` forward steps.

    An expert with fewer uses than ``threshold`` is only evicted where all are such.
    """

    decay: float = 0.9
    every: int = 16
    threshold: float = 0.0
    _uses: dict[Key, float] = field(default_factory=dict, init=False)
    _layer: int = field(default=-1, init=False)
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or self.every < 1:
            raise OptionError(
                f"decayed-lfu: decay={self.decay}, every={self.every}: decay above 0 and at most 1, every 1 or more"
            )

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        if layer <= self._layer:
            self._steps += 1
            if self._steps % self.every == 0:
                self._uses = {key: uses * self.decay for key, uses in self._uses.items()}
        self._layer = layer
        for expert in experts:
            if (layer, expert) in self._uses:
                self._uses[layer, expert] += 1

    def admitted(self, key: Key) -> None:
        self._uses[key] = 1.0

    def evicted(self, key: Key) -> None:
        self._uses.pop(key, None)

    def priorities(self, keys: list[Key]) -> list[tuple[bool, float]]:
        uses = [self._uses.get(key, 0.0) for key in keys]
        return [(one < self.threshold, one) for one in uses]


@dataclass(kw_only=True, eq=False)
class ScoreAware(Priority):
    """A running mean of router scores: S <- share * top(s) + (1 - share) * S, at every request of a layer.

    ``top`` keeps that many of the largest scores and takes the others as zero; 0 stands for twice the number of experts
    that the request names. Without scores each requested expert counts as scored alike.
    """

    share: float = 0.5
    top: int = 0
    _mean: dict[int, defaultdict[int, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.top < 0:
            raise OptionError(
                f"score-aware: share={self.share}, top={self.top}: share above 0 and at most 1, top 0 or more"
            )

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        if scores is None:
            top = {expert: 1 / len(experts) for expert in experts}
        else:
            largest = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
            top = {expert: scores[expert] for expert in largest[: self.top or 2 * len(experts)]}
        mean = self._mean.setdefault(layer, defaultdict(float))
        for expert in mean.keys() | top.keys():
            mean[expert] += self.share * (top.get(expert, 0.0) - mean[expert])

    def priorities(self, keys: list[Key]) -> list[float]:
        return [self._mean[layer][expert] if layer in self._mean else 0.0 for layer, expert in keys]


@dataclass(kw_only=True, eq=False)
class MultiTerm(Priority):
    """A weighted sum of recency, frequency, weighty uses and nearness of the layer; records last one sequence.

    recency * R/T + frequency * F/T + weighty * H/T + nearness * (1 - d/L): R the step of the last use, F uses, H uses
    in which the expert came within the first ``high`` of the combine weight (its precision matters), T steps so far, d
    how many layers ahead of the current one the expert's layer is, cyclically, of L.
    """

    pool: Literal["layer", "global"] = "global"
    recency: float = 0.25
    frequency: float = 0.25
    weighty: float = 0.25
    nearness: float = 0.25
    high: float = 0.6
    _last: dict[Key, int] = field(default_factory=dict, init=False)
    _terms: defaultdict[Key, float] = field(default_factory=lambda: defaultdict(float), init=False)
    _steps: int = field(default=1, init=False)
    _layer: int = field(default=-1, init=False)
    _layers: int = field(default=1, init=False)
    _there: set[Key] = field(default_factory=set, init=False)
    _ranked: list[tuple[float, Key]] | None = field(default=None, init=False)

    def reset(self) -> None:
        self._last, self._terms, self._steps = {}, defaultdict(float), 1
        self._layer, self._ranked = -1, None

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        if layer <= self._layer:
            self._steps += 1
        self._layer, self._layers, self._ranked = layer, max(self._layers, layer + 1), None
        for expert in experts:
            later = self._steps - self._last.get((layer, expert), 0)
            self._last[layer, expert] = self._steps
            self._terms[layer, expert] += self.recency * later + self.frequency
        for expert in first_share(experts, scores, self.high):
            self._terms[layer, expert] += self.weighty

    def admitted(self, key: Key) -> None:
        self._there.add(key)
        if self._ranked is not None:
            heapq.heappush(self._ranked, (self.priorities([key])[0], key))

    def evicted(self, key: Key) -> None:
        self._there.discard(key)

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        """As its base has it; but priorities change with requests alone, so one ranking serves all victims of one."""
        if self._ranked is None:
            keys = list(self._there)
            self._ranked = list(zip(self.priorities(keys), keys, strict=True))
            heapq.heapify(self._ranked)
        passed = list[tuple[float, Key]]()
        while self._ranked and (self._ranked[0][1] not in resident or self._ranked[0][1] in pinned):
            passed.append(heapq.heappop(self._ranked))
        found = self._ranked[0][1] if self._ranked else None
        for entry in passed:
            heapq.heappush(self._ranked, entry)
        return found

    def priorities(self, keys: list[Key]) -> list[float]:
        near = [self.nearness * (1 - ((i - self._layer) % self._layers) / self._layers) for i in range(self._layers)]
        terms, steps, layers = self._terms, self._steps, self._layers
        return [near[key[0] % layers] + (terms[key] / steps if key in terms else 0.0) for key in keys]


def first_share(experts: Sequence[int], scores: Sequence[float] | None, share: float) -> list[int]:
    """The experts of largest score, each of which has at most ``share`` of the total before it; all without scores."""
    if scores is None:
        return list(experts)
    order = sorted(experts, key=lambda expert: (-scores[expert], expert))
    total, before, found = sum(scores[expert] for expert in experts), 0.0, []
    for expert in order:
        if before <= share * total + 1e-12:
            found.append(expert)
        before += scores[expert]
    return found
