"""Policies that give every resident expert a priority and evict the least: recency and frequency."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moekit.run.policy import CachePolicy, Key


@dataclass(kw_only=True, eq=False)
class Priority(CachePolicy):
    """Evicts the candidate of least priority; ties go to the lower layer, then the lower expert.

    ``pool`` says where :func:`moekit.run.policy.policy` lets candidates come from: the ``layer`` of the incoming
    expert, within its fair share, or everywhere (``global``).
    """

    pool: Literal["layer", "global"] = "layer"

    @abstractmethod
    def priorities(self, keys: list[Key]) -> list[Any]:
        """One value per key, which compare: larger stays longer."""

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        candidates = [key for key in resident if key not in pinned]
        return min(zip(self.priorities(candidates), candidates, strict=True))[1] if candidates else None


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

    def priorities(self, keys: list[Key]) -> list[int]:
        return [self._last.get(key, 0) for key in keys]


@dataclass(kw_only=True, eq=False)
class LFU(Priority):
    """Least frequently used, counting all requests seen so far, those of absent experts too; ties by recency."""

    _uses: dict[Key, tuple[int, int]] = field(default_factory=dict, init=False)  # how often, and when last
    _clock: int = field(default=0, init=False)

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        self._clock += 1
        for key in ((layer, expert) for expert in experts):
            self._uses[key] = self._uses.get(key, (0, 0))[0] + 1, self._clock

    def priorities(self, keys: list[Key]) -> list[tuple[int, int]]:
        return [self._uses.get(key, (0, 0)) for key in keys]
