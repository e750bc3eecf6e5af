"""The MoE layers of a model class, as its skeleton on the meta device shows them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moekit.checkpoint import skeleton
from moekit.checkpoint.roles import Role, Roles, find_roles, live_roles
from moekit.errors import CheckpointError, UnsupportedModelError

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "top_k")
_FIXED_TOP_K = {"switch_transformers": 1, "nllb-moe": 2}
"""Model types whose class fixes how many experts a token uses, without a config field."""

_KEPT = 8
_CACHE: dict[str, Structure] = {}
"""Structures already derived in this process, by config; the oldest goes first."""


@dataclass(frozen=True)
class LayerShape:
    """The experts of one layer as the model class holds them.

    ``name`` is the path of the module that holds the experts, ``layer`` the index of its decoder layer. ``gated``:
    gate and up; ``interleaved``: their rows alternate; ``transposed``: matrices lie [in, out]. ``users``: how many
    routers choose from these experts for one token (layers or passes that share them).
    """

    name: str
    layer: int
    num_experts: int
    top_k: int
    groups: tuple[int, int] | None
    hidden_size: int
    intermediate_size: int
    gated: bool
    interleaved: bool
    transposed: bool
    biased: bool
    users: int = 1


@dataclass(frozen=True)
class Structure:
    """The model on the meta device, the role of each of its per-expert parameters, and its MoE layers in order."""

    model: PreTrainedModel
    roles: Mapping[str, Role]
    layers: Mapping[str, LayerShape]
    fixed_count: str | None = None
    """Why the number of experts cannot change, where it cannot."""


def structure(config: PretrainedConfig) -> Structure:
    """The structure of a config's model; derived once per process and config.

    Raises:
        CheckpointError: the model has no experts. UnsupportedModelError: experts that are not understood.
    """
    key = json.dumps([type(config).__name__, config.to_dict()], sort_keys=True, default=str)
    if key not in _CACHE:
        while len(_CACHE) >= _KEPT:
            _CACHE.pop(next(iter(_CACHE)))
        _CACHE[key] = _derive(copy.deepcopy(config))
    return _CACHE[key]


def _derive(config: PretrainedConfig) -> Structure:
    if not skeleton.names_experts(config):
        raise CheckpointError(
            f"{config.model_type} with this config is a dense model: it has no experts for moekit to work on"
        )
    model = skeleton.build(config)
    try:
        found, fixed_count = _grown(model, config)
    except UnsupportedModelError as reason:
        found, fixed_count = live_roles(model, reason), str(reason)
    parts = _parts(model, found.roles)
    shapes = {name: _shape(model, name, found, *parts[name]) for name in found.counts}
    return Structure(model, found.roles, shapes, fixed_count)


def _grown(model: PreTrainedModel, config: PretrainedConfig) -> tuple[Roles, str | None]:
    """What a larger model of the class tells, and why the number of experts cannot change, where it cannot."""
    kind = config.model_type
    larger = skeleton.grown(config)
    if larger is None:
        raise UnsupportedModelError(f"{kind} with this config has one expert in every layer")
    try:
        bigger = skeleton.build(larger[0])
    except Exception as error:
        raise UnsupportedModelError(f"{kind} cannot be built with {larger[1]} more experts: {error}") from None
    found = find_roles(model, bigger, larger[1])
    if not found.counts:
        raise UnsupportedModelError(f"{kind} with this config: none of its layers has experts that can be told apart")
    if (groups := getattr(config, "expert_step", 1)) > 1:
        return found, f"the router chooses from {groups} groups, all of one size"
    return _feed_forward_only(found)


def _feed_forward_only(found: Roles) -> tuple[Roles, str | None]:
    """Leave out experts of attention projections, which have no block of their own; they pin the shared count."""
    attention = [name for name in found.counts if re.search(r"att(entio)?n$", name)]
    roles = {name: role for name, role in found.roles.items() if role.layer not in attention}
    counts = {name: count for name, count in found.counts.items() if name not in attention}
    if attention:
        return Roles(roles, counts), f"the same count sizes the attention experts of {attention[0]}"
    unrouted = [name for name in counts if not any(r.layer == name and r.part == "row" for r in roles.values())]
    if unrouted:
        return Roles(roles, counts), f"the router of {unrouted[0]} has no row per expert (product keys)"
    return Roles(roles, counts), None


_Parts = dict[str, tuple[int, ...]]


def _parts(model: PreTrainedModel, roles: Mapping[str, Role]) -> dict[str, tuple[_Parts, bool]]:
    """By layer: the shape of each part of one expert, and whether ``down`` lies the other way round than the rest."""
    found: dict[str, tuple[_Parts, bool]] = {}
    parameters = model.state_dict()
    for name, role in roles.items():
        if role.part != "row":
            parts, turned = found.get(role.layer, ({}, False))
            shape = tuple(parameters[name].shape)
            parts[role.part] = shape if role.expert is not None else (role.rows, *shape[1:])[-2:]
            found[role.layer] = parts, turned or role.transposed
    return found


def _shape(model: PreTrainedModel, name: str, found: Roles, parts: _Parts, down_turned: bool) -> LayerShape:
    first = parts.get("gate_up") or parts.get("up") or ()
    down = parts.get("down", ())
    if len(first) != 2 or len(down) != 2:
        raise UnsupportedModelError(f"the experts of {name} are no pair of matrices (found {sorted(parts)})")
    module = _experts_module(model, name)
    transposed = bool(getattr(module, "is_transposed", False)) or _lies_transposed(parts)
    hidden, inner = (down[1], down[0]) if transposed or down_turned else (down[0], down[1])
    rows = first[1] if transposed else first[0]
    if "gate_up" in parts and rows not in (inner, 2 * inner):
        raise UnsupportedModelError(f"the experts of {name} have shapes {first} and {down}, which do not fit together")
    match = re.search(r"\.(\d+)(\.|$)", name)
    layer = int(match[1]) if match else 0
    config = _own_config(model, name)
    return LayerShape(
        name=name,
        layer=layer,
        num_experts=found.counts[name],
        top_k=_top_k(config, model.config, layer),
        groups=_groups(config),
        hidden_size=hidden,
        intermediate_size=inner,
        gated="gate" in parts or ("gate_up" in parts and rows == 2 * inner),
        interleaved=not getattr(module, "is_concatenated", True),
        transposed=transposed,
        biased=any(part.endswith("_bias") for part in parts),
        users=found.users.get(name, 1),
    )


def _experts_module(model: PreTrainedModel, name: str) -> nn.Module:
    parent = model.get_submodule(name)
    return getattr(parent, "experts", parent)


def _lies_transposed(parts: Mapping[str, tuple[int, ...]]) -> bool:
    """Gate and up side by side tell the orientation: [2I, H] beside [H, I], or [H, 2I] beside [I, H]."""
    if "gate_up" not in parts:
        return False
    (a, b), (c, d) = parts["gate_up"], parts["down"]
    return a == d and b == 2 * c


def _own_config(model: PreTrainedModel, name: str) -> Any:
    """The config of the innermost model that holds the layer, text before composite."""
    path, found = name, model.config
    best = -1
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (not prefix or path.startswith(prefix + ".")) and len(prefix) > best:
            best, found = len(prefix), module.config
    return found


def _top_k(config: Any, whole: Any, layer: int) -> int:
    for part in (*skeleton.nested(config), *skeleton.nested(whole)):
        for name in _TOP_K:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and layer < len(value):
                value = value[layer]
            if type(value) is int and value > 0:
                return value
    if whole.model_type in _FIXED_TOP_K:
        return _FIXED_TOP_K[whole.model_type]
    raise UnsupportedModelError(f"{whole.model_type}: the config does not say how many experts a token uses")


def _groups(config: Any) -> tuple[int, int] | None:
    count = next((getattr(config, name) for name in skeleton.GROUP_FIELDS if getattr(config, name, None)), None)
    chosen = getattr(config, "topk_group", None)
    if not count or not chosen or count == 1 or getattr(config, "topk_method", None) == "greedy":
        return None
    return int(count), int(chosen)
