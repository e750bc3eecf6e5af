"""Planning layer by layer that goes on where it was interrupted, and that several processes share.

Inside :func:`moekit.plan.values.spooling` every finished layer is a small plan in the spool's folder, under a name that
says all it follows from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moekit.errors import PlanError
from moekit.plan import ranks, values
from moekit.plan.document import Plan, located
from moekit.plan.layer import LayerPlan

Make = Callable[[], LayerPlan]


def planned_layers(makers: Mapping[str, Make], follows: Sequence[str | None]) -> dict[str, LayerPlan]:
    """The plan of every layer; ``follows`` is what all of them follow from (method, source, profile).

    Raises:
        PlanError: several processes without a folder to exchange layers in.
    """
    spool = values.spool()
    if spool is None:
        if ranks.size() > 1:
            raise PlanError("planning by several processes needs a folder that all of them see: plan inside spooling()")
        return {name: make() for name, make in makers.items()}
    notes = {name: spool.folder / f"{_key(name, follows)}.json" for name in makers}
    for name in ranks.own(list(makers)):
        if not notes[name].is_file():
            plan = Plan(source="", layers={name: makers[name]()})
            plan.save(notes[name], overwrite=True, with_values=False)
    ranks.wait()
    layers = {name: _noted(note, name, spool.folder) for name, note in notes.items()}
    ranks.wait()  # whoever leads may tidy the folder as soon as it has its plan
    return layers


def _noted(note: Path, name: str, folder: Path) -> LayerPlan:
    return located(Plan.load(note).layers[name], folder)


def _key(name: str, follows: Sequence[str | None]) -> str:
    return hashlib.sha256(json.dumps([name, *follows]).encode()).hexdigest()
