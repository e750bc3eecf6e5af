"""From a specification, ``easy-ep:keep=0.5``, to a method of this room; see :mod:`moekit.plan.options`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from moekit.errors import OptionError
from moekit.plan import options as specification
from moekit.plan.overrides import Overridden
from moekit.plan.planner import Method, Planner


def methods() -> tuple[str, ...]:
    """The names of all methods: the files of this room that do not begin with an underscore."""
    return specification.names(str(__package__))


def method(spec: str) -> Method:
    """The method that ``name`` or ``name:key=value,key=value`` is; OptionError names the nearest valid choice."""
    name, _, options = spec.partition(":")
    kind = _class_of(name.strip())
    return kind(**specification.values_of(name, kind, options))


def sequence(specs: Sequence[str]) -> list[Planner]:
    """Several methods to run one after the other.

    ``name@pattern:options`` overrides the options of the last method of that name in the layers whose names match the
    shell pattern; where none came before, the method runs in those layers only.
    """
    found: list[Planner] = []
    for spec in specs:
        head, _, options = spec.partition(":")
        name, at, pattern = (part.strip() for part in head.partition("@"))
        if not at:
            found.append(method(spec))
            continue
        kind = _class_of(name)
        if not pattern:
            raise OptionError(f"{spec}: expected a layer's name or a pattern after @, such as {name}@model.layers.0.*")
        values = specification.values_of(name, kind, options)
        at_most = [i for i, one in enumerate(found) if isinstance(one, Method | Overridden) and one.name == name]
        if not at_most:
            found.append(Overridden(None, ((pattern, kind(**values)),)))
            continue
        before = found[at_most[-1]]
        whole = before if isinstance(before, Overridden) else Overridden(cast(Method, before), ())
        found[at_most[-1]] = whole.but(pattern, **values)
    return found


def _class_of(name: str) -> type[Method]:
    return specification.class_of(str(__package__), Method, "method", name)  # type: ignore[type-abstract]
