"""A method fitted to a number of bytes: its size option is turned down until the weight files fit.

A chain of methods is written ``reap/rtn:bits=4``: first prune, then round. Of the options that set a size (``keep``,
``bits``, ``rank``) the first that a chain leaves open is turned; a chain that leaves none open fits or does not.
A method that searches is sized by drafts, plans as large that nothing was measured for, and then searches once.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from moekit.compress._options import method
from moekit.errors import OptionError, PlanError
from moekit.formats import WIDTHS
from moekit.plan.document import Plan
from moekit.plan.planner import Evaluate, Method, Planner, Source, make_plan
from moekit.plan.sizes import plan_nbytes

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile

DIALS = ("keep", "bits", "rank")
"""Options that set a method's size."""
HOLE = "{}"
Make = Callable[[str], Plan]
"""The plan of a chain all of whose options are given."""


@runtime_checkable
class Searcher(Planner, Protocol):
    """A method whose plan takes a search, but whose size does not depend on what is found."""

    def draft(self, profile: Profile | None, source: Source) -> Plan:
        """A plan of the very size, without measuring any."""
        ...


@dataclass(frozen=True)
class Drafted:
    """A searching method that makes its draft instead."""

    searcher: Searcher

    @property
    def needs(self) -> frozenset[str]:
        return self.searcher.needs

    @property
    def spec(self) -> str:
        return self.searcher.spec

    def plan(self, profile: Profile | None, source: Source, evaluate: Evaluate | None = None) -> Plan:
        return self.searcher.draft(profile, source)


def chain(spec: str) -> list[Method]:
    """The methods of ``A/B/...``, each with its options. OptionError names the nearest valid choice."""
    return [method(part) for part in spec.split("/")]


def within(
    spec: str,
    source: Checkpoint,
    profile: Profile | None,
    nbytes: int,
    evaluate: Evaluate | None = None,
    make: Make | None = None,
) -> tuple[str, Plan] | None:
    """The largest setting of a chain whose weight files take at most ``nbytes``, and what it is; None if none does.

    ``make`` is how plans are made (one that remembers them, say); ``make_plan`` with the profile if None.

    Raises:
        OptionError: an unknown method or option. ProfileError: the profile lacks what a method needs.
    """
    searches = any(isinstance(one, Searcher) for one in chain(spec))
    dial, values = _dial(spec.split("/"), source)

    def made(turned: str) -> Plan:
        return make(turned) if make else make_plan(chain(turned), source, profile, evaluate)

    def sized(turned: str) -> Plan:
        return make_plan(_drafts(turned), source, profile) if searches else made(turned)

    best: tuple[str, Plan] | None = None
    low, high, middle = 0, len(values) - 1, 0
    while low <= high:  # values ascend, and so do bytes; where the smallest does not fit, nothing does
        turned = dial.replace(HOLE, str(values[middle]))
        plan = _possible(sized, turned)
        if plan is not None and plan_nbytes(plan, source) <= nbytes:
            best, low = (turned, plan), middle + 1
        elif plan is None and middle == 0:
            low = 1
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    if best is None or not searches:
        return best
    return best[0], made(best[0])


def _drafts(spec: str) -> list[Planner]:
    return [Drafted(one) if isinstance(one, Searcher) else one for one in chain(spec)]


def _dial(parts: Sequence[str], source: Checkpoint) -> tuple[str, Sequence[Any]]:
    """The chain with :data:`HOLE` where its size is left open, and the values to try there, smallest first."""
    for place, part in enumerate(parts):
        found = _open(part, source)
        if found is not None:
            return "/".join([*parts[:place], found[0], *parts[place + 1 :]]), found[1]
    return "/".join(parts), [None]


def _open(part: str, source: Checkpoint) -> tuple[str, Sequence[Any]] | None:
    """The same for one method, or for the method inside it; None where no size is open."""
    kind = type(method(part))
    given = dict(option.strip().partition("=")[::2] for option in part.partition(":")[2].split(","))
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in DIALS and field.name not in given:
            values = _values(field.name, typing.get_type_hints(kind)[field.name], source)
            return f"{part}{',' if ':' in part else ':'}{field.name}={HOLE}", values
    inner = given.get("planner", "none")  # its options are set apart by ";"
    found = None if inner == "none" else _open(inner.replace(";", ","), source)
    return found and (part.replace(f"planner={inner}", f"planner={found[0].replace(',', ';')}"), found[1])


def _values(dial: str, hint: Any, source: Checkpoint) -> Sequence[Any]:
    layer = source.moe_layers[0]
    if dial == "keep":
        groups = layer.groups[0] if layer.groups else 1
        return [count for count in range(layer.top_k, layer.num_experts) if count % groups == 0]
    if dial == "rank":
        return range(1, min(layer.hidden_size, layer.intermediate_size) + 1)
    if hint is float:
        return [eighth / 8 for eighth in range(8, 65)]
    return [width for width in sorted(WIDTHS) if width < 16]


def _possible(made: Make, spec: str) -> Plan | None:
    """The plan; None where this setting cannot be had (a count that the router's groups do not allow)."""
    try:
        return made(spec)
    except (OptionError, PlanError):
        return None
