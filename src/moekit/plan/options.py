"""From a specification, ``easy-ep:keep=0.5``, to an object: the file of that name, its dataclass fields as options."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from moekit.errors import OptionError

T = TypeVar("T")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def names(package: str) -> tuple[str, ...]:
    """What a room offers: its files that do not begin with an underscore."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    found = pkgutil.iter_modules([str(folder)])
    return tuple(sorted(m.name.replace("_", "-") for m in found if not m.name.startswith("_")))


def class_of(package: str, base: type[T], what: str, name: str) -> type[T]:
    """The one class of its kind in the file of that name; OptionError names the nearest there is."""
    if name not in names(package):
        raise OptionError(f"unknown {what} '{name}'; {nearest(name, names(package))}")
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {what}"
    return found[0]


def values_of(name: str, kind: type, options: str) -> dict[str, Any]:
    """``key=value,key=value`` as arguments of a dataclass; OptionError names the nearest valid choice."""
    values: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not value:
            raise OptionError(f"{name}: expected key=value, found '{option}'")
        if key in values:
            raise OptionError(f"{name}: the option '{key}' is given twice")
        values[key] = _value(name, kind, key, value)
    return values


def _value(name: str, kind: type, key: str, text: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind) if field.init]
    if key not in known:
        raise OptionError(f"{name} has no option '{key}'; {nearest(key, known)}")
    accepted = _kinds(hints[key])
    for reader in accepted:
        try:
            return _read(reader, text)
        except ValueError:
            continue
    expected = " or ".join(_KINDS[k] if k in _KINDS else " or ".join(typing.get_args(k)) for k in accepted)
    raise OptionError(f"{name}: {key}={text} is not {expected}")


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type hint, whole numbers before fractions so that 8 stays a count and 0.5 a share."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return sorted(kinds, key=lambda kind: kind is not int)
    return [hint]


def _read(kind: Any, text: str) -> Any:
    """ValueError where the text is not of this kind."""
    if kind is bool:
        return bool(("false", "true").index(text.lower()))
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return choices[choices.index(text)]
    if typing.get_origin(kind) is tuple:
        return tuple(part for part in text.split("+") if part)
    return kind(text)


def nearest(found: str, known: Iterable[str]) -> str:
    known = sorted(known)
    if not known:
        return "it has none"
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    listed = f"choose one of {', '.join(known)}"
    return f"did you mean '{near[0]}'? ({listed})" if near else listed
