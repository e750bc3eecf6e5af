"""A method fitted to a number of bytes: its size option is turned down until the weight files fit.

A chain of methods is written ``reap/rtn:bits=4``: first prune, then round. Of the options that set a size (``keep``,
``bits``, ``rank``) the first that a chain leaves open is turned; a chain that leaves none open fits or does not.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moekit.compress._options import method
from moekit.errors import OptionError, PlanError
from moekit.formats import WIDTHS
from moekit.plan.document import Plan
from moekit.plan.planner import Evaluate, Method, make_plan
from moekit.plan.sizes import plan_nbytes

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile

DIALS = ("keep", "bits", "rank")
"""Options that set a method's size."""


def chain(spec: str) -> list[Method]:
    """The methods of ``A/B/...``, each with its options. OptionError names the nearest valid choice."""
    return [method(part) for part in spec.split("/")]


def within(
    spec: str,
    source: Checkpoint,
    profile: Profile | None,
    nbytes: int,
    evaluate: Evaluate | None = None,
) -> tuple[str, Plan] | None:
    """The largest setting of a chain whose weight files take at most ``nbytes``, and what it is; None if none does.

    Raises:
        OptionError: an unknown method or option. ProfileError: the profile lacks what a method needs.
    """
    parts = spec.split("/")
    chain(spec)
    place, dial, values = _dial(parts, source)
    best: tuple[str, Plan] | None = None
    low, high = 0, len(values) - 1
    while low <= high:  # values ascend, and so do bytes
        middle = (low + high + 1) // 2
        turned = _turned(parts, place, dial, values[middle])
        plan = _made(turned, source, profile, evaluate)
        if plan is not None and plan_nbytes(plan, source) <= nbytes:
            best, low = (turned, plan), middle + 1
        else:
            high = middle - 1
    return best


def _dial(parts: Sequence[str], source: Checkpoint) -> tuple[int, str, Sequence[Any]]:
    """Which part of a chain has its size open, by which option, and the values to try, smallest first."""
    for place, part in enumerate(parts):
        kind = type(method(part))
        given = {option.partition("=")[0].strip() for option in part.partition(":")[2].split(",")}
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name in DIALS and field.name not in given:
                return place, field.name, _values(field.name, typing.get_type_hints(kind)[field.name], source)
    return 0, "", [None]


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


def _turned(parts: Sequence[str], place: int, dial: str, value: Any) -> str:
    if not dial:
        return "/".join(parts)
    joint = "," if ":" in parts[place] else ":"
    return "/".join([*parts[:place], f"{parts[place]}{joint}{dial}={value}", *parts[place + 1 :]])


def _made(spec: str, source: Checkpoint, profile: Profile | None, evaluate: Evaluate | None) -> Plan | None:
    """The plan; None where this setting cannot be had (a count that the router's groups do not allow)."""
    try:
        return make_plan(chain(spec), source, profile, evaluate)
    except (OptionError, PlanError):
        return None
