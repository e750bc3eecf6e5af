"""Attributes of parts that refuse what they cannot be, whoever sets them: an option, a schedule, a caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import OptionError
from .parts import fits


class Limited:
    """A number of a part, which must be an ``hint`` (int or float) for which ``allowed(value, part)`` holds.

    ``says`` is the error's text, in which ``{value}`` and ``{at}`` (the part) stand for what was set where.
    """

    def __init__(self, hint: type, allowed: Callable[[Any, Any], bool], says: str) -> None:
        self.hint, self.allowed, self.says = hint, allowed, says

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, part: Any, owner: type | None = None) -> Any:
        return self if part is None else vars(part)[self.name]

    def __set__(self, part: Any, value: Any) -> None:
        self.check(part, value)
        vars(part)[self.name] = value

    def check(self, part: Any, value: Any) -> None:
        """Raises :class:`OptionError` for what the part cannot be given."""
        if not fits(value, self.hint) or not self.allowed(value, part):
            raise OptionError(self.says.format(value=value, at=part))


def slots(says: str) -> Any:
    """How many of its ``choices`` a part may take: 1 to all of them."""
    return Limited(int, lambda value, part: 1 <= value <= part.choices, f"{says}: give 1 to {{at.choices}}")


def portion(says: str) -> Any:
    """A share of something: more than 0, at most 1."""
    return Limited(float, lambda value, part: 0 < value <= 1, f"{says}: give more than 0 and at most 1")


def positive(says: str) -> Any:
    """Any number above 0."""
    return Limited(float, lambda value, part: value > 0, says)
