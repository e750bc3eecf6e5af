"""The plan: what shall become of every expert of every layer, as a document one can read, diff, edit and keep.

JSON, versioned; hidden-unit orders (from aligned merges) lie in a safetensors file of the same stem beside it, computed
values in a folder of the same stem.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from moekit.errors import OutputError, PlanError
from moekit.plan import values
from moekit.plan.check import check_layer, check_plan
from moekit.plan.codec import check_keys, dump, layer_from_json, layer_to_json, orders_of
from moekit.plan.layer import LayerPlan, Permutation, StoredExpert

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

__all__ = ["LayerPlan", "Permutation", "Plan", "StoredExpert"]

FORMAT, VERSION = "moekit-plan", 1
EXTRA = ("keep", "drop")
KEYS = ("format", "version", "source", "profile", "methods", "extra", "orders", "layers")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``source`` and ``profile`` are fingerprints; ``methods`` the specifications that made it, in order.

    A layer that is not named stays as it is. ``extra`` says what becomes of prediction layers that no text runs
    through (multi-token prediction heads): "keep" copies them untouched, "drop" leaves them out.
    """

    source: str
    layers: Mapping[str, LayerPlan]
    profile: str | None = None
    methods: tuple[str, ...] = ()
    extra: str = "keep"
    version: int = field(default=VERSION, init=False)

    def check(self, checkpoint: Checkpoint) -> None:
        """PlanError, in one line, if the plan is not sane for this checkpoint."""
        check_plan(self, checkpoint)

    def layer(self, name: str, num_experts: int) -> LayerPlan:
        """The plan of one layer; the identity where the plan does not name it."""
        return self.layers.get(name) or LayerPlan.identity(num_experts)

    @property
    def digests(self) -> frozenset[str]:
        """The files of values it names."""
        layers = self.layers.values()
        return frozenset(one.digest for layer in layers for one in (layer.values, layer.rewrite) if one is not None)

    @property
    def untouched(self) -> bool:
        return self.extra == "keep" and all(layer.untouched for layer in self.layers.values())

    def then(self, other: Plan) -> Plan:
        """This plan, then ``other`` on the result of this one; see :meth:`LayerPlan.then`."""
        layers = dict(self.layers)
        for name, layer in other.layers.items():
            layers[name] = layers[name].then(layer) if name in layers else layer
        return Plan(
            source=self.source,
            layers=layers,
            profile=self.profile or other.profile,
            methods=self.methods + other.methods,
            extra="drop" if "drop" in (self.extra, other.extra) else "keep",
        )

    def nbytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of the weight files that applying this plan writes, exactly."""
        from moekit.plan.sizes import plan_nbytes

        return plan_nbytes(self, checkpoint)

    @property
    def fingerprint(self) -> str:
        """Hash of everything the plan says, orders included."""
        return hashlib.sha256(dump(self._to_json()).encode()).hexdigest()

    def diff(self, other: Plan) -> list[str]:
        """One readable line per difference; empty if both say the same."""
        lines = [
            f"{key}: {getattr(self, key)} -> {getattr(other, key)}"
            for key in ("source", "profile", "methods", "extra")
            if getattr(self, key) != getattr(other, key)
        ]
        for name in [*self.layers, *(n for n in other.layers if n not in self.layers)]:
            mine, theirs = self.layers.get(name), other.layers.get(name)
            if mine != theirs:
                lines += _layer_diff(name, mine, theirs)
        return lines

    def save(self, path: str | Path, *, overwrite: bool = False, with_values: bool = True) -> None:
        """Write the JSON, ``<stem>.safetensors`` where hidden units are reordered, and ``<stem>.values`` where values
        were computed (unless told not to: an output holds them anyway). OutputError if it exists."""
        path = Path(path)
        tables = self._orders()
        try:
            if not overwrite and path.exists():
                raise OutputError(f"{path} exists; give another path or allow overwriting")
            path.parent.mkdir(parents=True, exist_ok=True)
            if tables:
                _replace(path.with_suffix(".safetensors"), save_tensors(tables))
            for layer in self.layers.values() if with_values else ():
                for one in (layer.values, layer.rewrite):
                    if one is not None:
                        values.store(one, values.folder_of(path))
            _replace(path, (dump(self._to_json()) + "\n").encode())
        except OSError as error:
            raise OutputError(f"cannot write the plan to {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan, its numbers checked as far as they can be without the model. PlanError in one line otherwise."""
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None
        except ValueError as error:
            raise PlanError(f"{path} is not JSON ({error}); expected a plan written by moekit") from None
        if not isinstance(found, Mapping) or found.get("format") != FORMAT:
            raise PlanError(f'{path} is no plan: expected "format": "{FORMAT}" in a JSON object')
        if found.get("version") != VERSION:
            raise PlanError(f"{path} has plan version {found.get('version')}; this moekit reads version {VERSION}")
        check_keys(found, KEYS, ("source", "layers"), str(path))
        plan = cls._from_json(found, _read_orders(path, found.get("orders")))
        folder = values.folder_of(path)
        return replace(plan, layers={name: located(layer, folder) for name, layer in plan.layers.items()})

    @classmethod
    def _from_json(cls, found: Mapping[str, Any], orders: Mapping[str, np.ndarray]) -> Plan:
        extra, methods, layers = found.get("extra", "keep"), found.get("methods", []), found["layers"]
        if extra not in EXTRA:
            raise PlanError(f"extra: expected one of {', '.join(EXTRA)}, found {extra!r}")
        if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
            raise PlanError("methods: expected a list of specifications such as 'reap:keep=0.5'")
        if not isinstance(layers, Mapping) or not isinstance(found["source"], str):
            raise PlanError("layers: expected an object of layer names, and source: a fingerprint")
        plans = {name: layer_from_json(layer, name, orders) for name, layer in layers.items()}
        for name, layer in plans.items():
            check_layer(name, layer)
        return cls(
            source=found["source"], profile=found.get("profile"), methods=tuple(methods), extra=extra, layers=plans
        )

    def _orders(self) -> dict[str, np.ndarray]:
        return {key: table for name, layer in self.layers.items() for key, table in orders_of(name, layer).items()}

    def _to_json(self) -> dict[str, Any]:
        tables = self._orders()
        found: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "source": self.source,
            "profile": self.profile,
            "methods": list(self.methods),
            "extra": self.extra,
        }
        if tables:
            found["orders"] = hashlib.sha256(save_tensors(tables)).hexdigest()
        return found | {"layers": {name: layer_to_json(layer) for name, layer in self.layers.items()}}


def located(layer: LayerPlan, folder: Path) -> LayerPlan:
    """The same layer with the files of its computed values, as far as ``folder`` holds them."""
    found = [None if one is None else values.find(one, folder) for one in (layer.values, layer.rewrite)]
    return replace(layer, values=found[0], rewrite=found[1])


def _read_orders(path: Path, digest: str | None) -> Mapping[str, np.ndarray]:
    if digest is None:
        return {}
    beside = path.with_suffix(".safetensors")
    try:
        data = beside.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise PlanError(
                f"{beside} does not belong to {path.name}: its content has changed; keep both files together"
            )
        return load_tensors(data)
    except (OSError, SafetensorError):
        raise PlanError(f"{path.name} needs the hidden-unit orders in {beside}, which cannot be read") from None


def _replace(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _layer_diff(name: str, mine: LayerPlan | None, theirs: LayerPlan | None) -> list[str]:
    if mine is None or theirs is None:
        return [f"{name}: {'not named' if mine is None else 'named'} -> {'not named' if theirs is None else 'named'}"]
    lines = []
    gone, come = sorted(mine.sources - theirs.sources), sorted(theirs.sources - mine.sources)
    if gone:
        lines.append(f"{name}: no longer keeps experts {', '.join(map(str, gone))}")
    if come:
        lines.append(f"{name}: now keeps experts {', '.join(map(str, come))}")
    before, after = ({e.parts: e for e in layer.experts} for layer in (mine, theirs))
    for parts, expert in before.items():
        other = after.get(parts)
        if other and other != expert:
            change = f"{expert.bits} bits in groups of {expert.group_size} -> {other.bits} in {other.group_size}"
            lines.append(f"{name}: expert {parts[0][0]}: {change}")
    merged = [len(parts) for parts in after if parts not in before and len(parts) > 1]
    if merged:
        lines.append(f"{name}: {len(merged)} new merged experts of {sum(merged)} sources")
    return lines or [f"{name}: router rows or slots differ"]
