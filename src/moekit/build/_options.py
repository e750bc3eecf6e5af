"""From a specification, ``sparse-unified:experts=8``, to a builder: the file of that name, its fields as options."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import typing
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from moekit.build._builder import Builder
from moekit.errors import OptionError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def builders() -> tuple[str, ...]:
    """The names of all builders: the files of this room that do not begin with an underscore."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return tuple(sorted(m.name.replace("_", "-") for m in found if not m.name.startswith("_")))


def builder(spec: str) -> Builder:
    """The builder that ``name`` or ``name:key=value,key=value`` is; OptionError names the nearest valid choice."""
    name, _, options = spec.partition(":")
    name = name.strip()
    if name not in builders():
        raise OptionError(f"unknown builder '{name}'; {_nearest(name, builders())}")
    module = importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
    kind = next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Builder) and value.__module__ == module.__name__
    )
    known = {field.name: typing.get_type_hints(kind)[field.name] for field in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not value:
            raise OptionError(f"{name}: expected key=value, found '{option}'")
        if key in values:
            raise OptionError(f"{name}: the option '{key}' is given twice")
        if key not in known:
            raise OptionError(f"{name} has no option '{key}'; {_nearest(key, known)}")
        values[key] = _read(f"{name}: {key}={value}", known[key], value)
    return kind(**values)


def _read(said: str, kind: Any, text: str) -> Any:
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if kind is bool:
        choices = ("false", "true")
    if choices:
        if text not in choices:
            raise OptionError(f"{said} is not {' or '.join(choices)}")
        return choices.index(text) == 1 if kind is bool else text
    try:
        return kind(text)
    except ValueError:
        raise OptionError(f"{said} is not {_KINDS[kind]}") from None


def _nearest(found: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.5)
    listed = f"choose one of {', '.join(sorted(known))}"
    return f"did you mean '{near[0]}'? ({listed})" if near else listed
