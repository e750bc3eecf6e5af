"""From a specification, ``easy-ep:keep=0.5``, to a method: the file of that name, its dataclass fields as options."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from moekit.errors import OptionError
from moekit.plan.overrides import Overridden
from moekit.plan.planner import Method, Planner

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def methods() -> tuple[str, ...]:
    """The names of all methods: the files of this room that do not begin with an underscore."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return tuple(sorted(m.name.replace("_", "-") for m in found if not m.name.startswith("_")))


def method(spec: str) -> Method:
    """The method that ``name`` or ``name:key=value,key=value`` is; OptionError names the nearest valid choice."""
    name, _, options = spec.partition(":")
    kind = _class_of(name.strip())
    return kind(**_values(name, kind, options))


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
        values = _values(name, kind, options)
        at_most = [i for i, one in enumerate(found) if isinstance(one, Method | Overridden) and one.name == name]
        if not at_most:
            found.append(Overridden(None, ((pattern, kind(**values)),)))
            continue
        before = found[at_most[-1]]
        whole = before if isinstance(before, Overridden) else Overridden(cast(Method, before), ())
        found[at_most[-1]] = whole.but(pattern, **values)
    return found


def _values(name: str, kind: type[Method], options: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not value:
            raise OptionError(f"{name}: expected key=value, found '{option}'")
        if key in values:
            raise OptionError(f"{name}: the option '{key}' is given twice")
        values[key] = _value(name, kind, key, value)
    return values


def _class_of(name: str) -> type[Method]:
    if name not in methods():
        raise OptionError(f"unknown method '{name}'; {_nearest(name, methods())}")
    module = importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one method"
    return found[0]


def _value(name: str, kind: type[Method], key: str, text: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if key not in known:
        raise OptionError(f"{name} has no option '{key}'; {_nearest(key, known)}")
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


def _nearest(found: str, known: Iterable[str]) -> str:
    known = sorted(known)
    if not known:
        return "it has none"
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    listed = f"choose one of {', '.join(known)}"
    return f"did you mean '{near[0]}'? ({listed})" if near else listed
