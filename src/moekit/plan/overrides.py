"""One method with other options in some layers: ``reap:keep=0.5`` and ``reap@model.layers.[0-3].*:keep=0.75``.

Layers are named by shell patterns. Each set of options plans its own layers as if the others were not there; a method
that is only given for some layers leaves the others as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from moekit.errors import OptionError
from moekit.plan.document import LayerPlan, Plan
from moekit.plan.planner import Evaluate, Method, Source, sites_of

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import Profile


@dataclass(frozen=True)
class Overridden:
    """A planner: ``base`` everywhere (None: nowhere) but in the layers that a pattern of ``overrides`` matches, where
    that method stands instead; of several that match, the last."""

    base: Method | None
    overrides: tuple[tuple[str, Method], ...]

    @property
    def name(self) -> str:
        return self.overrides[0][1].name

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(method.needs for method in self._methods))

    @property
    def specs(self) -> tuple[str, ...]:
        """As one would type them, one after the other."""
        found = [self.base.spec] if self.base else []
        return (*found, *(self._spec(pattern, method) for pattern, method in self.overrides))

    @property
    def spec(self) -> str:
        return " ".join(self.specs)

    def but(self, pattern: str, **options: Any) -> Overridden:
        """With another override; options that it does not name are those of the base, or the method's own."""
        base: Any = self.base or type(self.overrides[0][1])()
        return replace(self, overrides=(*self.overrides, (pattern, replace(base, **options))))

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        """The plans of all, each of its own layers. OptionError for a pattern that matches no layer."""
        mine: dict[str, int] = {site.name: 0 for site in sites_of(source) if not site.extra}
        for number, (pattern, _) in enumerate(self.overrides, 1):
            for name in self._matched(pattern, list(mine)):
                mine[name] = number
        layers: dict[str, LayerPlan] = {}
        extra = "keep"
        for number, method in enumerate((self.base, *(method for _, method in self.overrides))):
            names = frozenset(name for name, of in mine.items() if of == number)
            if method is None or not names:
                continue
            made = method.plan(profile, _Part(source, names), evaluate)
            layers |= {name: layer for name, layer in made.layers.items() if name in names}
            extra = "drop" if "drop" in (extra, made.extra) else "keep"
        ordered = {name: layers[name] for name in mine if name in layers}
        fingerprint = profile.fingerprint if profile and self.needs else None
        return Plan(source=source.fingerprint, profile=fingerprint, methods=self.specs, layers=ordered, extra=extra)

    @property
    def _methods(self) -> Sequence[Method]:
        return [method for method in (self.base, *(method for _, method in self.overrides)) if method]

    def _spec(self, pattern: str, method: Method) -> str:
        return method.spec.replace(method.name, f"{method.name}@{pattern}", 1)

    def _matched(self, pattern: str, names: Sequence[str]) -> list[str]:
        found = [name for name in names if matches(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            raise OptionError(
                f"{self.name}@{pattern} matches no MoE layer; did you mean '{near[0]}'? (they are named {names[0]}"
                + (f" to {names[-1]}; * stands for anything)" if len(names) > 1 else ")")
            )
        return found


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern names a layer, or the module it lies in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


@dataclass(frozen=True)
class _Part:
    """A source of which only some layers are there to be planned, and those that no text runs through."""

    source: Source
    names: frozenset[str]

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def moe_layers(self) -> Sequence[Any]:
        return [layer for layer in self.source.moe_layers if layer.extra or layer.name in self.names]

    def bank(self, layer: str) -> DenseBank:
        return self.source.bank(layer)
