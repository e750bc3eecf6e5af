"""Smaller models inside a large one: courses that draw which part of it takes a step, and its use afterwards.

Shapes by suffix: E choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .layer import MoE
from .moment import Moment, chances_of


class Drawn:
    """One of ``sizes`` at every step, with the given ``chances`` (equal where there are none).

    That many are in: any of them, or with ``nested`` the first, so that every size is part of the next (SortedNet).
    """

    drawn = True

    def __init__(self, *, sizes: Sequence[int], chances: Sequence[float] | None = None, nested: bool = False) -> None:
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            raise OptionError(f"sizes={list(sizes)} to draw from: give whole numbers from 1 on")
        self.sizes, self.chances, self.nested = list(sizes), chances_of(len(sizes), chances, "sizes"), nested

    def mask(self, total: int, moment: Moment, *, own: bool) -> Tensor | None:
        """bool [total], or None if all are in. The size is drawn once for all modules, which are in may be ``own``."""
        size = self.sizes[int(torch.multinomial(self.chances, 1, generator=moment.generator()))]
        if size >= total:
            return None
        order = torch.arange(total) if self.nested else torch.randperm(total, generator=moment.generator(own=own))
        mask = torch.zeros(total, dtype=torch.bool)
        mask[order[:size]] = True
        return mask


class Candidates(Drawn):
    """So many candidates of a router, drawn for each by itself: its ``pool`` (ERNIE 5.0, elastic width)."""

    def __call__(self, moment: Moment, module: Any) -> Tensor | None:
        return self.mask(module.num_experts, moment, own=True)


class Members(Drawn):
    """True in so many of the modules that a schedule moves: layers that are ``active`` (ERNIE 5.0, elastic depth)."""

    def __call__(self, moment: Moment, module: nn.Module) -> bool:
        mask = self.mask(moment.of, moment, own=False)
        return mask is None or bool(mask[moment.number])


@contextmanager
def restricted(
    model: nn.Module,
    *,
    layers: int | Sequence[bool] | None = None,
    experts: int | Tensor | None = None,
    k: int | None = None,
) -> Iterator[None]:
    """While open, the model runs as the smaller one inside it: some layers, some experts, fewer slots per token.

    A number means the first so many; ``layers`` may also say of each layer whether it runs, ``experts`` be a mask [E]
    of candidates. Experts of other kinds stay.

    Raises:
        OptionError: more than there are, fewer than one, or a router without a number of slots.
    """
    before: list[tuple[nn.Module, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        stack = [module for module in model.modules() if hasattr(module, "active")]
        if layers is not None:
            for layer, active in zip(stack, _first(layers, len(stack), "layers"), strict=True):
                put(layer, "active", active)
        for layer in model.modules():
            if isinstance(layer, MoE):
                if experts is not None:
                    put(layer.gate, "pool", _pool(layer, experts))
                if k is not None:
                    selector = layer.gate.selector
                    if not hasattr(selector, "k"):
                        raise OptionError(f"{type(selector).__name__} has no number of slots that could be {k}")
                    put(selector, "k", k)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


def _first(wanted: int | Sequence[bool], total: int, what: str) -> list[bool]:
    if isinstance(wanted, int):
        if not 1 <= wanted <= total:
            raise OptionError(f"the first {wanted} {what} of {total}: give 1 to {total}")
        return [number < wanted for number in range(total)]
    if len(wanted) != total or not any(wanted):
        raise OptionError(f"{what} marked {list(wanted)}: mark one of {total} at least")
    return list(wanted)


def _pool(layer: MoE, experts: int | Tensor) -> Tensor:
    if isinstance(experts, Tensor):
        own = _first(experts.tolist(), layer.num_experts, "experts")
    else:
        own = _first(experts, layer.num_experts, "experts")
    return torch.tensor(own + [True] * len(layer.others))
