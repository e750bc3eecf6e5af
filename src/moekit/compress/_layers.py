"""Plans of methods that look at several layers before they decide each: resumed and shared out layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from moekit.plan.layer import LayerPlan
from moekit.plan.planner import Method, PlannedSource, Source
from moekit.plan.resume import planned_layers

if TYPE_CHECKING:
    from moekit.plan.document import Plan
    from moekit.profile import Profile


def made(
    method: Method, makers: Mapping[str, Callable[[], LayerPlan]], profile: Profile | None, source: Source
) -> Plan:
    """The method's plan of these layers, each made by its maker unless an interrupted run or another process did."""
    done = source.done.fingerprint if isinstance(source, PlannedSource) else None
    follows = [method.spec, source.fingerprint, done, profile.fingerprint if profile else None]
    return method.made(planned_layers(makers, follows), profile, source)
