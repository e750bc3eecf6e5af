"""Rules of what a missing expert is read at, by name: as it is, as a copy in fewer bits, or not at all."""

from __future__ import annotations

import importlib
from typing import Any

from moekit.errors import OptionError
from moekit.plan.options import nearest, values_of
from moekit.run._stand_in import Read

_RULES = {"hobbit": "moekit.run.hobbit:Hobbit"}


def rules() -> tuple[str, ...]:
    """The names that :func:`rule` knows."""
    return tuple(_RULES)


def rule(spec: str) -> Read:
    """A rule from ``name`` or ``name:key=value,key=value``; OptionError names the nearest valid choice."""
    name, _, options = spec.partition(":")
    name = name.strip()
    if name not in _RULES:
        raise OptionError(f"unknown rule for stand-ins '{name}'; {nearest(name, _RULES)}")
    module, _, kind = _RULES[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), kind)
    read: Read = found(**values_of(name, found, options)).read
    return read
