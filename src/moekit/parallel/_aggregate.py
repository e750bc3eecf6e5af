"""One model with the experts of several: what there is per expert is put side by side, the rest taken from them.

Nothing is guessed from names. The class is built with the sum of the counts, and a tensor is per expert where its size
differs there; along that axis the models' own are joined.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from moekit.blocks import blocks
from moekit.checkpoint.skeleton import COUNT_FIELDS, GROUP_FIELDS, nested
from moekit.errors import OptionError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


@torch.no_grad()
def aggregate(models: Sequence[Model], rest: Sequence[float] | None = None) -> Model:
    """A model of the same family with all experts and router rows of ``models``, in their order, top-k as it was.

    ``rest`` weighs the models in everything that is not per expert (default: all of it from the first).

    Raises:
        OptionError: fewer than two models, models of different families or sizes, weights that do not fit.
        UnsupportedModelError: experts that are chosen by groups, which would be other groups.
    """
    weights = list(rest) if rest is not None else [1.0] + [0.0] * (len(models) - 1)
    if len(models) < 2 or len(weights) != len(models) or abs(sum(weights) - 1) > 1e-6:
        raise OptionError(f"{len(models)} models with weights {weights}: give two or more, and weights that sum to 1")
    made = _with_counts(models)
    states = [model.state_dict() for model in models]
    joined = {name: _join(name, [state.get(name) for state in states], t, weights) for name, t in _own(made)}
    made.load_state_dict(joined)
    made.tie_weights()
    return made.train(models[0].training)


def _own(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return list(model.state_dict().items())


def _with_counts(models: Sequence[Model]) -> Model:
    config = copy.deepcopy(models[0].config)
    counts = [blocks(model)[0].num_experts for model in models]
    for at, part in enumerate(nested(config)):
        if any((getattr(part, name, None) or 1) > 1 for name in GROUP_FIELDS if isinstance(vars(part).get(name), int)):
            raise UnsupportedModelError(
                f"{type(models[0]).__name__} chooses experts by groups: joined, they would be other groups"
            )
        for name in COUNT_FIELDS:
            if vars(part).get(name) in counts:
                setattr(part, name, sum(vars(nested(model.config)[at])[name] for model in models))
    with torch.random.fork_rng(devices=[]):
        return type(models[0])(config).to(models[0].dtype)


def _join(name: str, tensors: Sequence[Tensor | None], made: Tensor, weights: Sequence[float]) -> Tensor:
    present = [t for t in tensors if t is not None]
    shapes = [tuple(t.shape) for t in present]
    if len(present) < len(tensors) or any(len(shape) != made.dim() for shape in shapes):
        raise OptionError(f"{name} is not in every model: they must be of one family, sizes and number of layers")
    axes = [axis for axis in range(made.dim()) if any(shape[axis] != made.shape[axis] for shape in shapes)]
    if not axes:
        total = torch.zeros(made.shape, dtype=torch.float64)
        for weight, tensor in zip(weights, present, strict=True):
            total += weight * tensor
        return total.to(made.dtype) if made.is_floating_point() else present[0]
    (axis, *more) = axes
    if more or sum(shape[axis] for shape in shapes) != made.shape[axis]:
        raise OptionError(f"{name} is {shapes} in the models and cannot be joined to {tuple(made.shape)}")
    return torch.cat(present, axis)
