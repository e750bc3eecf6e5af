"""Telling a router's recipe by experiment: a random double of the module is run, and the recipe that repeats it found.

No list of families is consulted, so a new family whose router is built of known parts needs no code. The double has the
module's own settings but random weights and biases, so that a bias, a group limit or a floor that happens to be
neutral in the model at hand is still seen.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import ACTIVATIONS, Recipe

_TOKENS = 64
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Trial:
    """One forward of a router's double: what it was, what it was given, what came out."""

    double: nn.Module
    output: Any
    input_dims: int
    extra: dict[str, Tensor]


def try_out(module: nn.Module, num_experts: int) -> Trial | None:
    """Run a random double of ``module`` on flat tokens, else on sequences; None if it takes neither."""
    double = _double(module, num_experts)
    extra = _extra(module, num_experts)
    for width, dims in itertools.product(_widths(double), (2, 3)):
        generator = torch.Generator().manual_seed(width)
        # Tokens of very different size, so that a floor under the sum of the weights shows.
        hidden = torch.randn(_TOKENS, width, generator=generator) * torch.logspace(-1, 0.5, _TOKENS)[:, None]
        shaped = hidden if dims == 2 else hidden.reshape(4, -1, width)
        with torch.no_grad():
            try:
                return Trial(double, double(shaped, **extra), dims, extra)
            except (RuntimeError, ValueError, IndexError):
                continue
    return None


def locate(output: Any, num_experts: int) -> tuple[int, int, int] | None:
    """Positions of logits [T, >= E], weights [T, K] and ids [T, K] in a router's output, told by shape and dtype."""
    if not isinstance(output, tuple):
        return None
    tensors = [(i, t) for i, t in enumerate(output) if isinstance(t, Tensor) and t.dim() == 2]
    ids = [(i, t) for i, t in tensors if not t.is_floating_point() and t.shape[0] == _TOKENS]
    if len(ids) != 1:
        return None
    index, expert = ids[0]
    logits = [i for i, t in tensors if t.is_floating_point() and t.shape[0] == _TOKENS and t.shape[1] >= num_experts]
    weights = [i for i, t in tensors if t.is_floating_point() and t.shape == expert.shape and i not in logits[:1]]
    return (logits[0], weights[0], index) if logits and weights else None


def identify(
    trial: Trial, logits: Tensor, weight: Tensor, expert: Tensor, *, skips_from: int | None = None, choice: bool = True
) -> Recipe | None:
    """The recipe under which ``logits`` give ``expert`` and ``weight``, or None; ``choice=False`` fits weights only."""
    best: tuple[float, Recipe] | None = None
    for recipe, bias in _selections(trial, logits, expert.shape[1]):
        if choice and not _same_choice(recipe.select(logits, bias), expert, weight, skips_from):
            continue
        for candidate, scale in _weightings(trial.double, recipe, logits.shape[1]):
            error, factor = _fit(candidate.weigh(logits, expert, scale), weight)
            if error < _TOLERANCE and (best is None or error < best[0] * 0.5):
                best = error, replace(candidate, scale=_snap(factor, trial.double, expert.shape[1]))
    return None if best is None else best[1]


def fingerprint(module: nn.Module, parent: nn.Module, num_experts: int) -> Any:
    """What decides a recipe: the class and its plain settings, but not the number of the layer."""

    def plain(part: nn.Module, kinds: Any) -> tuple[Any, ...]:
        return tuple(sorted((k, v) for k, v in vars(part).items() if isinstance(v, kinds) and "layer" not in k))

    shapes = tuple((k, tuple(t.shape)) for k, t in itertools.chain(module.named_parameters(), module.named_buffers()))
    return type(module), plain(module, bool | int | float | str), plain(parent, bool | int | float), shapes, num_experts


def _double(module: nn.Module, num_experts: int) -> nn.Module:
    double = copy.deepcopy(module)
    for part in double.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    double = double.to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in itertools.chain(double.named_parameters(), double.named_buffers()):
        data = tensor.data
        if not data.is_floating_point():
            data.random_(0, num_experts, generator=generator)
        elif data.dim() >= 2 and data.shape[0] > 1:
            data.normal_(0.0, 1.5 / math.sqrt(data.shape[-1]), generator=generator)
        elif "bias" in name:
            data.uniform_(-0.8, 0.4, generator=generator)
            data.view(-1)[num_experts:] = 0.2  # so that classes beyond the experts are chosen often enough to be seen
        else:
            data.uniform_(0.5, 1.5, generator=generator)
    return double


def _widths(double: nn.Module) -> list[int]:
    """Hidden sizes a router may read: the last axes of its matrices, first come first."""
    return list(dict.fromkeys(p.shape[-1] for p in double.parameters() if p.dim() == 2 and p.shape[0] > 1))


def _extra(module: nn.Module, num_experts: int) -> dict[str, Tensor]:
    extra: dict[str, Tensor] = {}
    for name in list(inspect.signature(module.forward).parameters)[1:]:
        if "bias" in name:
            extra[name] = torch.rand(num_experts, generator=torch.Generator().manual_seed(2)) - 0.5
        elif name == "input_ids":
            extra[name] = torch.zeros(_TOKENS, dtype=torch.long)
    return extra


def _selections(trial: Trial, logits: Tensor, top_k: int) -> Iterator[tuple[Recipe, Tensor | None]]:
    columns = logits.shape[1]
    named: dict[str, Tensor] = {n: t.data for n, t in trial.double.named_parameters()}
    named |= dict(trial.double.named_buffers()) | trial.extra
    flat = {n: t.reshape(-1) for n, t in named.items() if t.numel() == columns and t.is_floating_point()}
    biases: list[tuple[str | None, Tensor | None]] = [(None, None), *flat.items()]
    groups = _groups(trial.double)
    for activation, (name, bias), (group, score, fill) in itertools.product(ACTIVATIONS, biases, groups):
        for ranked in ("scores", "logits"):
            recipe = Recipe(top_k=top_k, activation=activation, ranked=ranked, bias_name=name, groups=group)
            yield replace(recipe, group_score=score, fill=fill), bias


def _groups(module: nn.Module) -> list[tuple[tuple[int, int] | None, str, float]]:
    """Without groups, and every way of limiting to the groups the module's settings name."""
    count = next((v for k in ("num_group", "n_group") if (v := getattr(module, k, None))), None)
    kept = getattr(module, "topk_group", None)
    plain: list[tuple[tuple[int, int] | None, str, float]] = [(None, "top2", -math.inf)]
    if not count or not kept or count == 1:
        return plain
    return plain + [((count, kept), s, f) for s in ("top2", "max") for f in (-math.inf, 0.0)]


def _weightings(double: nn.Module, recipe: Recipe, columns: int) -> Iterator[tuple[Recipe, Tensor | None]]:
    floors = [v for k, v in vars(double).items() if isinstance(v, float) and 0 < v < 1e-2]
    sums = [("sum", eps) for eps in (1e-20, 1e-15, 1e-12, 1e-6, *floors)]
    kinds: list[tuple[str, float] | None] = [None, *sums, *(("clamp", v) for v in floors), ("norm", 2.0)]
    scales: list[tuple[str | None, Tensor | None]] = [(None, None)]
    scales += [(n, p.data) for n, p in double.named_parameters() if p.shape == (columns,) and n != recipe.bias_name]
    for (name, scale), kind in itertools.product(scales, kinds):
        yield replace(recipe, normalise=kind, expert_scale=name), scale
    if recipe.activation == "softmax" and recipe.ranked == "logits":
        yield replace(recipe, weights="softmax"), None


def _same_choice(mine: Tensor, theirs: Tensor, weight: Tensor, skips_from: int | None) -> bool:
    if skips_from is not None:
        mine = mine.masked_fill(mine >= skips_from, -1)
        theirs = theirs.masked_fill(weight == 0, -1)
    return torch.equal(mine.sort(dim=1).values, theirs.sort(dim=1).values)


def _fit(mine: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Largest relative error of ``theirs = factor * mine`` under the best constant factor, and that factor."""
    mine, theirs = mine.double(), theirs.double()
    seen = (mine.abs() > 1e-30) & (theirs != 0)
    if not bool(seen.any()) or not bool(torch.isfinite(mine[seen]).all()):
        return math.inf, 1.0
    ratio = theirs[seen] / mine[seen]
    factor = ratio.median()
    return float((ratio / factor - 1).abs().max()), float(factor)


def _snap(factor: float, double: nn.Module, top_k: int) -> float:
    """The setting the measured factor stands for, so that no rounding of the measurement stays in it."""
    settings = [1.0, 1.0 / top_k, *(float(v) for v in vars(double).values() if isinstance(v, int | float))]
    return next((v for v in settings if v and abs(factor / v - 1) < _TOLERANCE), factor)
