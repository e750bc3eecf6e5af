"""From a specification, ``sparse-unified:experts=8``, to a builder of this room; see :mod:`moekit.plan.options`."""

from __future__ import annotations

from moekit.build._builder import Builder
from moekit.plan import options as specification


def builders() -> tuple[str, ...]:
    """The names of all builders: the files of this room that do not begin with an underscore."""
    return specification.names(str(__package__))


def builder(spec: str) -> Builder:
    """The builder that ``name`` or ``name:key=value,key=value`` is; OptionError names the nearest valid choice."""
    name, _, options = spec.partition(":")
    name = name.strip()
    kind = specification.class_of(str(__package__), Builder, "builder", name)  # type: ignore[type-abstract]
    return kind(**specification.values_of(name, kind, options))
