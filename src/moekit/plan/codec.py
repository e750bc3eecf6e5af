"""The plan's JSON form of one layer: short for what is plain, explicit for what is not, one line per stored expert.

An expert is ``{"from": 3}`` or ``{"from": {"3": 0.25, "7": 0.75}}``, with ``bits`` and ``group_size`` where quantised
and ``"reordered": true`` where hidden units are permuted (the orders lie in the safetensors beside the plan).
A router row is a source row, or ``{"3": 0.5, "7": 0.5}``. ``values`` names the file with computed numbers by its
SHA-256, with the description of the bank in it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moekit.errors import PlanError
from moekit.plan.layer import LayerPlan, Permutation, Row, StoredExpert
from moekit.plan.values import Values

LAYER_KEYS = ("why", "num_experts", "experts", "slots", "rows", "values", "rewrite")
REQUIRED = LAYER_KEYS[1:5]
VALUES_KEYS = ("sha256", "bank", "edits", "chosen")
EXPERT_KEYS = ("from", "bits", "group_size", "reordered")


def check_keys(found: Mapping[str, Any], known: Iterable[str], required: Iterable[str], where: str) -> None:
    """PlanError for a key that means nothing (with the nearest that does) or one that is missing."""
    known = tuple(known)
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise PlanError(f"{where}: unknown key '{key}'; did you mean '{near}'?")
    for key in required:
        if key not in found:
            raise PlanError(f"{where}: the key '{key}' is missing")


def layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    found = {
        "why": layer.why,
        "num_experts": layer.num_experts,
        "experts": [_expert_to_json(expert) for expert in layer.experts],
        "slots": list(layer.slots),
        "rows": [_mix_to_json(row) for row in layer.rows],
    }
    for key, values in (("values", layer.values), ("rewrite", layer.rewrite)):
        if values is not None:
            found[key] = _values_to_json(values)
    return found


def layer_from_json(found: Any, name: str, orders: Mapping[str, np.ndarray]) -> LayerPlan:
    where = f"layer {name}"
    if not isinstance(found, Mapping):
        raise PlanError(f"{where}: expected an object with the keys {', '.join(LAYER_KEYS)}, found {_kind(found)}")
    check_keys(found, LAYER_KEYS, REQUIRED, where)
    for key in ("experts", "slots", "rows"):
        if not isinstance(found[key], list):
            raise PlanError(f"{where}: '{key}' must be a list, found {_kind(found[key])}")
    return LayerPlan(
        num_experts=_integer(found["num_experts"], f"{where}: num_experts"),
        experts=tuple(
            _expert_from_json(e, f"{where}, stored expert {i}", orders.get(order_key(name, i)))
            for i, e in enumerate(found["experts"])
        ),
        slots=tuple(_integer(s, f"{where}, slot {i}") for i, s in enumerate(found["slots"])),
        rows=tuple(_mix_from_json(r, f"{where}, router row {i}") for i, r in enumerate(found["rows"])),
        why=str(found.get("why", "")),
        values=_values_from_json(found["values"], where) if "values" in found else None,
        rewrite=_values_from_json(found["rewrite"], where) if "rewrite" in found else None,
    )


def order_key(layer: str, expert: int) -> str:
    """Name in the safetensors of the [parts, I] int32 orders of one stored expert."""
    return f"{layer}.experts.{expert}.order"


def orders_of(name: str, layer: LayerPlan) -> dict[str, np.ndarray]:
    tables = {}
    for index, expert in enumerate(layer.experts):
        if any(expert.orders):
            size = max(len(order) for order in expert.orders if order)
            same = np.arange(size, dtype=np.int32)
            rows = [order.array() if order else same for order in expert.orders]
            tables[order_key(name, index)] = np.stack(rows).astype(np.int32)
    return tables


def dump(value: Any, depth: int = 0, flat_from: int = 4) -> str:
    """JSON with two-space indents, but anything from ``flat_from`` levels down, and lists of numbers, on one line."""
    scalars = isinstance(value, list) and not any(isinstance(v, (Mapping, list)) for v in value)
    if not value or not isinstance(value, (Mapping, list)) or (scalars and depth) or depth >= flat_from:
        return json.dumps(value, ensure_ascii=True)
    pad, end = "  " * (depth + 1), "  " * depth
    if isinstance(value, Mapping):
        body = [f"{pad}{json.dumps(key)}: {dump(item, depth + 1, flat_from)}" for key, item in value.items()]
        return "{\n" + ",\n".join(body) + f"\n{end}}}"
    return "[\n" + ",\n".join(pad + dump(item, depth + 1, flat_from) for item in value) + f"\n{end}]"


def _values_to_json(values: Values) -> dict[str, Any]:
    found: dict[str, Any] = {"sha256": values.digest, "bank": values.describe}
    if values.edits:
        found["edits"] = list(values.edits)
    if values.chosen is not None:
        found["chosen"] = list(values.chosen)
    return found


def _values_from_json(found: Any, where: str) -> Values:
    if not isinstance(found, Mapping):
        raise PlanError(f"{where}: values: expected an object with the keys {', '.join(VALUES_KEYS)}")
    check_keys(found, VALUES_KEYS, VALUES_KEYS[:2], f"{where}: values")
    if not re.fullmatch("[0-9a-f]{64}", str(found["sha256"])):
        raise PlanError(f"{where}: values: expected the SHA-256 of a file, found {_kind(found['sha256'])}")
    chosen = found.get("chosen")
    return Values(
        json.dumps(found["bank"], sort_keys=True),
        found["sha256"],
        tuple(found.get("edits", ())),
        None if chosen is None else tuple(_integer(e, f"{where}: values") for e in chosen),
    )


def _expert_to_json(expert: StoredExpert) -> dict[str, Any]:
    found: dict[str, Any] = {"from": _parts_to_json(expert.parts)}
    if expert.bits != 16:
        found["bits"] = expert.bits
    if expert.bits != 16 or expert.group_size != 64:
        found["group_size"] = expert.group_size
    if any(expert.orders):
        found["reordered"] = True
    return found


def _expert_from_json(found: Any, where: str, orders: np.ndarray | None) -> StoredExpert:
    if not isinstance(found, Mapping):
        raise PlanError(f'{where}: expected an object such as {{"from": 3}}, found {_kind(found)}')
    check_keys(found, EXPERT_KEYS, ("from",), where)
    parts = _parts_from_json(found["from"], where)
    if bool(found.get("reordered")) != (orders is not None) or (orders is not None and len(orders) != len(parts)):
        raise PlanError(f"{where}: its hidden-unit orders are not in the safetensors beside the plan; keep both files")
    return StoredExpert(
        parts,
        _integer(found.get("bits", 16), f"{where}: bits"),
        _integer(found.get("group_size", 64), f"{where}: group_size"),
        () if orders is None else tuple(_order(row) for row in orders),
    )


def _order(row: np.ndarray) -> Permutation | None:
    return None if np.array_equal(row, np.arange(len(row))) else Permutation.of(row)


def _parts_to_json(parts: Row) -> int | dict[str, float] | list[list[float]]:
    if len({source for source, _ in parts}) == len(parts):
        return _mix_to_json(parts)
    return [[source, coefficient] for source, coefficient in parts]


def _parts_from_json(found: Any, where: str) -> Row:
    if isinstance(found, list):  # the same source twice, in two orders
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in found):
            raise PlanError(f"{where}: a list of parts must hold [expert, coefficient] pairs")
        return tuple((_integer(e, where), _number(c, where)) for e, c in found)
    return _mix_from_json(found, where)


def _mix_to_json(row: Row) -> int | dict[str, float]:
    if len(row) == 1 and row[0][1] == 1.0:
        return row[0][0]
    return {str(source): coefficient for source, coefficient in row}


def _mix_from_json(found: Any, where: str) -> Row:
    if not isinstance(found, Mapping):
        return ((_integer(found, where), 1.0),)
    try:
        return tuple((int(source), _number(coefficient, where)) for source, coefficient in found.items())
    except ValueError:
        raise PlanError(f"{where}: the keys must be expert numbers, found {', '.join(map(repr, found))}") from None


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{where}: expected a whole number, found {_kind(value)}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"{where}: expected a number, found {_kind(value)}")
    return float(value)


def _kind(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
