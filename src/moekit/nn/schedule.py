"""Any attribute of any part, moved over training: how many experts a token uses, a temperature, the candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .elastic import Candidates, Members
from .limits import Limited
from .moment import Moment, chances_of
from .parts import fits, make


def stretch(begin: float, until: float) -> tuple[float, float]:
    """Both, if they are shares of a run and the first is not later; :class:`OptionError` otherwise."""
    if not 0 <= begin <= until <= 1:
        raise OptionError(f"a course from {begin:g} to {until:g}: both are shares of the run, the first not later")
    return begin, until


class Moving:
    """From ``start`` to ``end`` while the run goes from share ``begin`` to share ``until``; held before and after."""

    def __init__(self, *, start: float, end: float, begin: float = 0.0, until: float = 1.0) -> None:
        self.begin, self.until = stretch(begin, until)
        self.start, self.end = start, end
        self.values = [start, end]

    def __call__(self, moment: Moment, module: nn.Module) -> float:
        return self.between(moment.share(self.begin, self.until))

    def between(self, share: float) -> float:
        raise NotImplementedError


class LinearCourse(Moving):
    """Evenly."""

    def between(self, share: float) -> float:
        return self.start + (self.end - self.start) * share


class ExponentialCourse(Moving):
    """By equal factors; both ends must be positive."""

    def __init__(self, *, start: float, end: float, begin: float = 0.0, until: float = 1.0) -> None:
        super().__init__(start=start, end=end, begin=begin, until=until)
        if start <= 0 or end <= 0:
            raise OptionError(f"an exponential course from {start:g} to {end:g}: both must be positive")

    def between(self, share: float) -> float:
        return self.start * (self.end / self.start) ** share


class CosineCourse(Moving):
    """Slowly at both ends."""

    def between(self, share: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * share))


class Steps:
    """``values[0]``, then ``values[i]`` from the share ``at[i - 1]`` of the run on."""

    def __init__(self, *, values: Sequence[Any], at: Sequence[float]) -> None:
        if len(values) != len(at) + 1 or list(at) != sorted(at) or not all(0 <= share <= 1 for share in at):
            raise OptionError(f"{len(values)} values need {len(values) - 1} rising shares of the run, got {list(at)}")
        self.values, self.at = list(values), list(at)

    def __call__(self, moment: Moment, module: nn.Module) -> Any:
        return self.values[sum(moment.step >= share * moment.steps for share in self.at)]


class Draw:
    """One of ``values`` at every step, with the given ``chances`` (equal where there are none)."""

    drawn = True

    def __init__(self, *, values: Sequence[Any], chances: Sequence[float] | None = None) -> None:
        self.values, self.chances = list(values), chances_of(len(values), chances, "values")

    def __call__(self, moment: Moment, module: nn.Module) -> Any:
        return self.values[int(torch.multinomial(self.chances, 1, generator=moment.generator()))]


class Pool:
    """Candidates of a router, a mask [E] drawn anew at every step.

    Before the share ``begin`` of the run as many as ``own`` (a share of the choices) are candidates, from ``until`` on
    all are, and evenly more in between.
    """

    drawn = True

    def __init__(self, *, own: float, begin: float = 0.0, until: float = 1.0) -> None:
        if not 0 < own <= 1:
            raise OptionError(f"own={own:g} is a share of a router's choices: give more than 0 and at most 1")
        self.own, (self.begin, self.until) = own, stretch(begin, until)

    def __call__(self, moment: Moment, module: nn.Module) -> Tensor | None:
        choices = module.num_experts
        assert isinstance(choices, int)
        share = self.own + (1 - self.own) * moment.share(self.begin, self.until)
        count = max(1, math.floor(share * choices))
        if count >= choices:
            return None
        mask = torch.zeros(choices, dtype=torch.bool)
        mask[torch.randperm(choices, generator=moment.generator(own=True))[:count]] = True
        return mask


COURSES: dict[str, Callable[..., Any]] = {
    "linear": LinearCourse,
    "exponential": ExponentialCourse,
    "cosine": CosineCourse,
    "steps": Steps,
    "draw": Draw,
    "pool": Pool,
    "candidates": Candidates,
    "members": Members,
}
"""By the name a recipe gives; called with (moment, module that owns the attribute), returns its value."""

TRAINABLE = "trainable"


class Schedule:
    """Sets one attribute, in every module that a shell pattern names, before each step.

    ``target`` is a pattern of a module's path and the attribute's name: ``*.layers.[0-3].mlp.gate.selector.k``. An
    attribute that holds a whole number stays one. ``trainable`` is an attribute of every module: while it is false, its
    parameters are frozen (staged training).

    Raises:
        OptionError: no module matches, one has no such attribute, or it cannot be what the course makes of it.
    """

    def __init__(self, model: nn.Module, target: str, course: Mapping[str, Any]) -> None:
        pattern, _, self.attribute = target.rpartition(".")
        self.stream = crc32(target.encode())  # two schedules never draw the same numbers
        self.course = make("course", COURSES, course)
        found = [module for name, module in model.named_modules() if fnmatchcase(name, pattern)]
        self.modules = [module for module in found if self.attribute == TRAINABLE or hasattr(module, self.attribute)]
        if not found:
            raise OptionError(f"schedule {target!r}: no module of the model is called {pattern}")
        if not self.modules:
            raise OptionError(f"schedule {target!r}: {type(found[0]).__name__} has no attribute {self.attribute!r}")
        self.before = [getattr(module, self.attribute, True) for module in self.modules]
        self.whole = all(type(value) is int for value in self.before)
        for module, value in zip(self.modules, self.before, strict=True):
            self._check(target, module, value)

    def _check(self, target: str, module: nn.Module, before: Any) -> None:
        """What the course will give must be fit for the attribute: found out before the run, not in the midst of it."""
        owner = getattr(type(module), self.attribute, None)
        if callable(before) or (isinstance(owner, property) and owner.fset is None):
            raise OptionError(f"schedule {target!r}: {type(module).__name__}.{self.attribute} cannot be set")
        if isinstance(self.course, Pool | Candidates) and self.attribute != "pool":
            raise OptionError(
                f"schedule {target!r}: candidates are drawn for a router's pool, not for {self.attribute}"
            )
        values = [self._held(value) for value in getattr(self.course, "values", [])]
        if values and before is None:
            raise OptionError(f"schedule {target!r}: {self.attribute} has no value that {values[0]!r} could follow")
        moves = isinstance(self.course, Moving)
        if self.whole and moves:
            values += range(min(values), max(values))  # it comes by those between, too
        for value in values:
            alike = all(fits(before, kind) == fits(value, kind) for kind in (bool, float))
            if not alike:
                raise OptionError(
                    f"schedule {target!r} gives {value!r}, and {self.attribute} is of type {type(before).__name__}: "
                    "give values of that type"
                )
            if isinstance(owner, Limited):
                owner.check(module, value)

    def _held(self, value: Any) -> Any:
        return round(value) if self.whole and isinstance(value, float) else value

    def end(self) -> None:
        """Training is over: what was drawn anew at each step goes back to what it was, every other value stays."""
        if getattr(self.course, "drawn", False):
            for module, value in zip(self.modules, self.before, strict=True):
                setattr(module, self.attribute, value)

    def apply(self, moment: Moment) -> None:
        """Give the attribute its value for this step."""
        moment = replace(moment, stream=self.stream, of=len(self.modules))
        for number, module in enumerate(self.modules):
            value = self.course(replace(moment, number=number), module)
            if self.attribute == TRAINABLE:
                module.requires_grad_(bool(value))
                continue
            setattr(module, self.attribute, self._held(value))
