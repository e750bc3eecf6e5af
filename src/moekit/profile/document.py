"""A profile: what was observed while a model routed some text. The one thing planners, caches and plots read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any, Protocol

import numpy as np

from moekit.errors import ProfileError
from moekit.profile import _file, _merge
from moekit.profile._reservoir import Quota
from moekit.profile.layer import LayerProfile, RoutePlan

LEAST_TOKENS = 32
"""An expert that saw fewer tokens than this counts as starved."""


class LayerPlans(Protocol):
    """The part of a plan that a profile needs: the plan of each layer it changes."""

    @property
    def layers(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Tokens:
    """Which tokens the rows of traces are, all arrays of one length: ``sequence``, ``position``, ``domain`` and
    ``phase`` (index into ``schema.PHASES``)."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


@dataclass(frozen=True)
class Profile:
    """``source``: fingerprint of the model; ``layers`` by module name, in order; ``held_out``: token ids by domain that
    were kept aside for measuring; ``options``: how the text was read (lengths, seed, bounds); ``model``: a
    name to show.
    """

    source: str
    model: str
    domains: tuple[str, ...]
    layers: Mapping[str, LayerProfile]
    held_out: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    trace: Tokens = field(default_factory=Tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in it: equal for equal profiles, whichever machine they were made on."""
        return _file.fingerprint(self)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What every layer has."""
        common = set.intersection(*(set(layer.arrays) for layer in self.layers.values())) if self.layers else set()
        return tuple(sorted(common))

    @property
    def quota(self) -> Quota:
        """How many tokens of each layer and expert the sample was to hold."""
        return Quota(int(self.options.get("sample", 0)), float(self.options.get("balanced", 0.0)))

    @property
    def num_tokens(self) -> int:
        """Tokens observed, padding not counted."""
        return int(max((float(layer.total("tokens")) for layer in self.layers.values()), default=0.0))

    def require(self, statistics: Sequence[str]) -> None:
        """Raise ProfileError unless every statistic named was observed."""
        for layer in self.layers.values():
            for name in statistics:
                layer.array(name)

    def check_source(self, fingerprint: str) -> None:
        """Raise ProfileError unless this profile is of the model with that fingerprint."""
        if self.source != fingerprint:
            raise ProfileError(
                f"the profile is of another model ({self.model}, fingerprint {self.source[:12]}; this one has "
                f"{fingerprint[:12]}): profile this checkpoint"
            )

    def starved(self, least: int = LEAST_TOKENS) -> dict[str, tuple[int, ...]]:
        """Layer -> experts that fewer than ``least`` tokens chose; layers without any are left out."""
        found = {name: layer.starved(least) for name, layer in self.layers.items()}
        return {name: experts for name, experts in found.items() if experts}

    def undersampled(self, least: int | None = None) -> dict[str, tuple[int, ...]]:
        """Layer -> experts with fewer than ``least`` sampled tokens (None: what a balanced sample promises, at least
        1); layers without any are left out. Raises ProfileError where nothing was sampled."""
        found = {}
        for name, layer in self.layers.items():
            wanted = max(1, self.quota.each(layer.num_experts, layer.top_k)) if least is None else least
            found[name] = tuple(np.flatnonzero(layer.sampled() < wanted).tolist())
        return {name: experts for name, experts in found.items() if experts}

    def merge(self, other: Profile) -> Profile:
        """Both profiles' observations as one. Counts are exact; other sums are, to float64's last bits.

        Raises ProfileError where the two are of different models or hold different statistics.
        """
        return _merge.merge(self, other)

    def recombined(self, plan: LayerPlans) -> Profile:
        """The profile as a plan leaves the model: see :meth:`LayerProfile.recombined`."""
        changed: dict[str, RoutePlan] = {n: p for n, p in plan.layers.items() if n in self.layers}
        layers = {n: layer.recombined(changed[n]) if n in changed else layer for n, layer in self.layers.items()}
        return replace(self, layers=layers)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """One file, the same bytes for the same profile. Raises OutputError if it exists or cannot be written."""
        _file.save(self, path, overwrite)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Profile:
        """Raises ProfileError for a file that is missing, no profile, corrupt, or of a version not known here."""
        return _file.load(path)

    def tables(self, least: int = LEAST_TOKENS) -> list[Any]:
        """What a terminal shows: see :class:`moekit.profile.tables.Table`."""
        from moekit.profile.tables import tables

        return tables(self, least)

    def report(self, path: str | PathLike[str], *, overwrite: bool = True) -> None:
        """One HTML page that needs nothing else: heat maps of load, norms, co-activation and what to trust."""
        from moekit.profile.report import write

        write(self, path, overwrite)
