"""Cache policies: which resident expert makes room for another. Pure state machines, the same in replay and for real.

A store tells a policy what is routed, admitted and evicted, and asks it for victims. Policies by name and options:
``policy("lru")``, ``policy("decayed-lfu:decay=0.9")``, ``policy("lfu:pinned=mine.profile,hot=0.05,quotas=2+1")``.
"""
# ruff: noqa: B027 (hooks that need not be filled)

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import fields, make_dataclass
from typing import Any

from moekit.errors import OptionError
from moekit.plan.options import nearest, values_of

Key = tuple[int, int]
"""(MoE layer index, counted from 0 over the layers that have experts; expert id)."""


class CachePolicy(ABC):
    """No I/O, no clock, no randomness: the same calls give the same victims.

    Whoever owns the cache calls, for each batch of tokens at each layer: :meth:`routed` once with all experts the batch
    needs; then, for each that is missing, :meth:`victim` as often as room is lacking, :meth:`evicted` for what went and
    :meth:`admitted` for what came. A prefetch asks for victims and is admitted in the same way, without being routed.
    """

    def reset(self) -> None:
        """A new sequence or request begins. What is resident stays; a policy forgets what it wants to."""

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        """The set of ``experts`` that a batch needs at ``layer``, told before its misses are served.

        ``scores`` [E] are router probabilities, mean over the batch, or None where nobody knows them.
        """

    def admitted(self, key: Key) -> None:
        """``key`` is resident from now on."""

    def evicted(self, key: Key) -> None:
        """``key`` is no longer resident."""

    @abstractmethod
    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        """Whom to evict for ``incoming``: one of ``resident`` that is not ``pinned``.

        None where nothing may go, or where ``incoming`` is not worth anybody's place: it is then served without being
        kept, or not prefetched.
        """


_POLICIES = {
    "lru": "moekit.run._policies:LRU",
    "lfu": "moekit.run._policies:LFU",
    "decayed-lfu": "moekit.run._policies_scored:DecayedLFU",
    "score-aware": "moekit.run._policies_scored:ScoreAware",
    "multi-term": "moekit.run._policies_scored:MultiTerm",
    "arc": "moekit.run._policies_arc:ARC",
}


def policies() -> tuple[str, ...]:
    """The names that :func:`policy` knows."""
    return tuple(_POLICIES)


def policy(spec: str, source: str | None = None) -> CachePolicy:
    """A fresh policy from ``name`` or ``name:key=value,key=value``; OptionError names the nearest valid choice.

    Those whose option ``pool`` is ``layer`` (the default of most) choose victims within a layer's fair share of the
    cache; see :class:`moekit.run._policies_pools.LayerPools`. All of them take ``pinned=PROFILE``, ``hot`` and
    ``quotas`` as well, see :class:`moekit.run._policies_spec.Around`; ``source`` is the fingerprint of the model that
    the profile must be of.
    """
    from moekit.run._policies_spec import Around

    name, _, options = spec.partition(":")
    name = name.strip()
    if name not in _POLICIES:
        raise OptionError(f"unknown cache policy '{name}'; {nearest(name, _POLICIES)}")
    module, _, kind = _POLICIES[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), kind)
    values = values_of(name, make_dataclass(name, [], bases=(found, Around)), options)
    around = Around(**{field.name: values.pop(field.name) for field in fields(Around) if field.name in values})
    made = found(**values)
    return around.put(made, made.pool == "layer", source)
