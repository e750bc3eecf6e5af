"""Planning that computes values is long: layers an interrupted run finished are taken as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from moekit.plan import values
from moekit.plan.codec import layer_from_json, layer_to_json
from moekit.plan.document import located
from moekit.plan.layer import LayerPlan


def resumed(name: str, follows: Sequence[str | None], make: Callable[[], LayerPlan]) -> LayerPlan:
    """A layer's plan, taken from an earlier run where it computed values and follows from the same, else made.

    Only inside :func:`moekit.plan.values.spooling`; layers without computed values are made anew each time.
    """
    spool = values.spool()
    if spool is None:
        return make()
    key = hashlib.sha256(json.dumps([name, *follows]).encode()).hexdigest()
    if (noted := spool.recall(key)) is not None:
        return located(layer_from_json(json.loads(noted), name, {}), spool.folder)
    layer = make()
    reordered = any(any(expert.orders) for expert in layer.experts)
    if layer.values is not None and not reordered:  # orders lie in the plan's own file
        spool.remember(key, json.dumps(layer_to_json(layer)))
    return layer
