"""The config.json of an output: the source's, with the counts, groups and quantisation that the plan changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.skeleton import COUNT_FIELDS, GROUP_FIELDS, nested
from moekit.errors import PlanError
from moekit.plan.target import LayerTarget, Target

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

_PREDICTION = re.compile(r"num_nextn_predict_layers|(num_)?mtp_(num_)?(hidden_)?layers|num_mtp_modules")
"""What families call the number of their prediction layers."""


def output_config(checkpoint: Checkpoint, target: Target, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """The raw config of the output.

    Raises:
        PlanError: the config has no field, or no single one, for the number of experts or groups the plan leaves.
    """
    config: dict[str, Any] = copy.deepcopy(dict(checkpoint.config))
    config.pop("auto_map", None)  # it names code, which is never copied
    _set_counts(checkpoint, config, target)
    _set_groups(config, target)
    if target.dropped:
        for part in _dicts(config):
            for key in part:
                if _PREDICTION.fullmatch(key):
                    part[key] = 0
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    elif target.dense:
        del config["quantization_config"]
    return config


def _set_counts(checkpoint: Checkpoint, config: dict[str, Any], target: Target) -> None:
    before = {layer.layer.num_experts for layer in target.layers.values()}
    after = {len(layer.rows) for layer in target.layers.values()}
    if all(len(layer.rows) == layer.layer.num_experts for layer in target.layers.values()):
        return
    if len(before) > 1:
        raise PlanError(
            f"the model's layers have different numbers of experts ({', '.join(map(str, sorted(before)))}), of which "
            "its config cannot be changed one by one; keep all router rows and use --format moekit"
        )
    old, new = before.pop(), after.pop()
    found = [(part, key) for part in _dicts(config) for key in COUNT_FIELDS if part.get(key) == old]
    if not found:
        found = [_default_field(checkpoint, config, old)]
    for part, key in found:
        part[key] = new


def _default_field(checkpoint: Checkpoint, config: dict[str, Any], old: int) -> tuple[dict[str, Any], str]:
    """Where to write a count that config.json leaves to the family's default."""
    whole = checkpoint.transformers_config
    for part in nested(whole):
        for key in COUNT_FIELDS:
            if vars(part).get(key) == old:
                owner = next((name for name, value in vars(whole).items() if value is part), None)
                return (config if owner is None else config.setdefault(owner, {})), key
    raise PlanError(
        f"config.json has no field for the number of experts, {old}, that moekit knows "
        f"({', '.join(COUNT_FIELDS)}), so it cannot be changed; keep all router rows and use --format moekit"
    )


def _set_groups(config: dict[str, Any], target: Target) -> None:
    left = {name: groups_left(layer) for name, layer in target.layers.items()}
    changed = {name: pair for name, pair in left.items() if pair is not None and pair[0] != pair[1]}
    if not changed:
        return
    if len(set(left.values())) > 1:
        raise PlanError("the plan drops groups of experts in some layers only, but the config has one number of groups")
    before, after = next(iter(changed.values()))
    found = [(part, key) for part in _dicts(config) for key in GROUP_FIELDS if part.get(key) == before]
    if not found:
        raise PlanError(f"config.json has no field for the number of groups, {before}, so no group can be dropped")
    for part, key in found:
        part[key] = after


def groups_left(target: LayerTarget) -> tuple[int, int] | None:
    """(groups of the source, groups of which the output has rows), or None where routing is not grouped."""
    if not target.layer.groups:
        return None
    groups = target.layer.groups[0]
    size = target.layer.num_experts // groups
    return groups, len({row[0][0] // size for row in target.rows if row})


def _dicts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _dicts(value)
