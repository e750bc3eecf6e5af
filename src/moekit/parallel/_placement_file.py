"""A placement on disk: one JSON document with the model, the experts of every layer by device, and predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moekit.errors import OutputError, PlanError
from moekit.parallel._links import Grid
from moekit.parallel.placement import Placement

FORMAT, VERSION = "moekit-placement", 1


@dataclass(frozen=True, eq=False)
class PlacementFile:
    """``source``: fingerprint of the model; ``layers``: module name and decoder layer number of every MoE layer, in
    order; ``decoder_layers``: how many the model has, dense ones included; ``predicted``: figures to show."""

    placement: Placement
    source: str
    model: str
    how: str
    layers: tuple[tuple[str, int], ...]
    decoder_layers: int
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        placement = self.placement
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "model": self.model,
            "how": self.how,
            "devices": placement.devices,
            "nodes": placement.grid.nodes,
            "decoder_layers": self.decoder_layers,
            "layers": [
                {
                    "name": name,
                    "layer": number,
                    "experts": [placement.experts(index, device) for device in range(placement.devices)],
                }
                for index, (name, number) in enumerate(self.layers)
            ],
            "predicted": dict(self.predicted),
        }

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """OutputError if it exists or cannot be written."""
        write_json(path, self.as_dict(), overwrite=overwrite)

    @classmethod
    def load(cls, path: Path) -> PlacementFile:
        """PlanError for a file that is missing, no placement, of another version, or that loses an expert."""
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(
                f"{path} cannot be read as a placement ({error.__class__.__name__}): give its file"
            ) from None
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise PlanError(f"{path} is no placement of version {VERSION}: make one with `moekit place`")
        grid = Grid.of(data["devices"], data["nodes"])
        device = np.stack([_devices(path, layer, grid.world) for layer in data["layers"]])
        layers = tuple((layer["name"], layer["layer"]) for layer in data["layers"])
        own = {name: data[name] for name in ("source", "model", "how", "decoder_layers", "predicted")}
        return cls(placement=Placement(device, grid), layers=layers, **own)


def _devices(path: Path, layer: Mapping[str, Any], devices: int) -> np.ndarray:
    """[E] from the experts by device; every expert is kept exactly once."""
    kept = [expert for experts in layer["experts"] for expert in experts]
    if len(layer["experts"]) != devices or sorted(kept) != list(range(len(kept))):
        raise PlanError(f"{path}: {layer['name']} does not keep every expert once on {devices} devices: place again")
    device = np.zeros(len(kept), int)
    for number, experts in enumerate(layer["experts"]):
        device[experts] = number
    return device


def write_json(path: Path, data: Any, *, overwrite: bool = False) -> None:
    """OutputError if the file exists or cannot be written."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another name or give --overwrite")
    try:
        path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): choose another place") from None
