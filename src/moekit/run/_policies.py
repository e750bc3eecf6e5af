"""Policies that give every resident expert a priority and evict the least: recency and frequency."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moekit.run.policy import CachePolicy, Key


@dataclass(kw_only=True, eq=False)
class Priority(CachePolicy):
    """Evicts the candidate of least :meth:`priority`; ties go to the lower layer, then the lower expert.

    ``pool`` is where candidates come from: the ``layer`` of the incoming expert, within its fair share, or everywhere
    (``global``).
    """

    pool: Literal["layer", "global"] = "layer"

    @abstractmethod
    def priority(self, key: Key) -> Any:
        """What compares: larger stays longer."""

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        kept = set(pinned)
        return min(
            (key for key in resident if key not in kept), key=lambda key: (self.priority(key), key), default=None
        )


@dataclass(kw_only=True, eq=False)
class LRU(Priority):
    """Least recently used: by the last request or admission.

    A global LRU over all layers hits nothing while a model decodes with less room than one token's experts, because
    layers are visited in a cycle; ``pool="layer"`` is the honest baseline.
    """

    _last: dict[Key, int] = field(default_factory=dict, init=False)
    _clock: int = field(default=0, init=False)

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        for expert in experts:
            self.admitted((layer, expert))

    def admitted(self, key: Key) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def priority(self, key: Key) -> int:
        return self._last.get(key, 0)


@dataclass(kw_only=True, eq=False)
class LFU(Priority):
    """Least frequently used, counting all requests seen so far, those of absent experts too; ties by recency."""

    _uses: Counter[Key] = field(default_factory=Counter, init=False)
    _last: dict[Key, int] = field(default_factory=dict, init=False)
    _clock: int = field(default=0, init=False)

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        self._clock += 1
        for expert in experts:
            self._uses[layer, expert] += 1
            self._last[layer, expert] = self._clock

    def priority(self, key: Key) -> tuple[int, int]:
        return self._uses[key], self._last.get(key, 0)
