"""What in a model depends on its number of experts, found by building it twice without weights and comparing."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError

_COUNT = re.compile(r"^(?!.*(shared|zero|per_tok|top))(n|num|moe)_.*experts$")
_GROUPS = {"n_group": 0, "num_expert_group": 0, "topk_group": 1}


@dataclass(frozen=True)
class Comparison:
    """``shapes``: tensor name -> (shape with the old count, with the new). ``numbers``: (module, attribute) -> new."""

    shapes: dict[str, tuple[torch.Size, torch.Size]]
    numbers: dict[tuple[str, str], int]


def compare(model: nn.Module, old: int, new: int, groups: tuple[int, int] | None = None) -> Comparison:
    """The class of ``model`` with ``old`` experts against itself with ``new``, on the meta device.

    Raises :class:`PlanError` where no field of the configuration moves the number of experts.
    """
    config = copy.deepcopy(model.config)
    before = _empty(type(model), config)
    resize(config, old, new, groups)
    after = _empty(type(model), config)
    sizes = {name: tensor.shape for name, tensor in _tensors(after)}
    shapes = {n: (t.shape, sizes[n]) for n, t in _tensors(before) if n in sizes and t.shape != sizes[n]}
    if not shapes:
        raise PlanError(
            f"no field of {type(model.config).__name__} says {old} experts: the count of this model cannot be changed"
        )
    modules, numbers = dict(after.named_modules()), {}
    for name, module in before.named_modules():
        for attribute, value in vars(module).items():
            other = vars(modules[name]).get(attribute) if name in modules else None
            if type(value) is int and type(other) is int and value != other:
                numbers[name, attribute] = other
    return Comparison(shapes, numbers)


def num_experts(config: Any) -> int | None:
    """The number of experts a configuration, or one inside it, speaks of; None for a dense model's."""
    values = [v for part in _configs(config) for k, v in vars(part).items() if type(v) is int and _COUNT.match(k)]
    return next((v for v in values if v > 1), None)


def resize(config: Any, old: int, new: int, groups: tuple[int, int] | None) -> None:
    """Set the count, under whatever name, in a configuration and those inside it; the groups too if they change."""
    for part in _configs(config):
        _resize_part(part, old, new, groups)


def _resize_part(part: Any, old: int, new: int, groups: tuple[int, int] | None) -> None:
    for field, value in list(vars(part).items()):
        if value == old and type(value) is int and _COUNT.match(field):
            setattr(part, field, new)
        elif groups is not None and field in _GROUPS and type(value) is int:
            setattr(part, field, groups[_GROUPS[field]])


def apply_numbers(model: nn.Module, found: Comparison, old: int, new: int, groups: tuple[int, int] | None) -> None:
    """Set every count a live model keeps: on its modules, and in each configuration any of them holds."""
    for (name, attribute), value in found.numbers.items():
        setattr(model.get_submodule(name), attribute, value)
    held = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    for part in {id(part): part for config in held for part in _configs(config)}.values():
        _resize_part(part, old, new, groups)


def _empty(cls: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(copy.deepcopy(config))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        if (inner := getattr(config, name, None)) is not None:
            yield from _configs(inner)
