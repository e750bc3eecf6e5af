"""Experts of stock modules trained in a structured form, by torch's own parametrisations on their stacked parameters.

The module keeps its class and its forward: reading ``gate_up_proj`` or ``down_proj`` computes them from what is
trained. :func:`settle` makes plain weights of it again; :func:`held` gives what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moekit.blocks import MoEBlock
from moekit.errors import UnsupportedModelError
from moekit.formats import LowRankBank
from moekit.formats.lowrank import Factors
from moekit.train.forms import Form, LowRankSparse


class Stacked(nn.Module):
    """A stack [E, ..] as a family keeps it, made of forms for its matrices (two where gate and up lie in one)."""

    def __init__(self, forms: list[Form], *, transposed: bool, interleaved: bool) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)
        self.transposed, self.interleaved = transposed, interleaved
        self.widths: list[int] = []

    def right_inverse(self, stack: Tensor) -> tuple[Tensor, ...]:
        held = [cast(Form, form).hold(part) for form, part in zip(self.forms, self.split(stack), strict=True)]
        self.widths = [len(parts) for parts in held]
        return tuple(tensor for parts in held for tensor in parts)

    def forward(self, *held: Tensor) -> Tensor:
        return self.join([form(*parts) for form, parts in self.grouped(held)])

    def grouped(self, held: tuple[Tensor, ...]) -> Iterator[tuple[Form, tuple[Tensor, ...]]]:
        """Each form with what it trains."""
        start = 0
        for form, width in zip(self.forms, self.widths, strict=True):
            yield cast(Form, form), held[start : start + width]
            start += width

    def split(self, stack: Tensor) -> list[Tensor]:
        """Canonical matrices [E, R, K]."""
        whole = stack.transpose(1, 2) if self.transposed else stack
        if len(self.forms) == 1:
            return [whole]
        return [whole[:, 0::2], whole[:, 1::2]] if self.interleaved else list(whole.chunk(2, dim=1))

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        whole = torch.stack(parts, dim=2).flatten(1, 2) if self.interleaved and len(parts) > 1 else torch.cat(parts, 1)
        return whole.transpose(1, 2) if self.transposed else whole


def parametrise(block: MoEBlock, form: Callable[[], Form]) -> dict[str, Stacked]:
    """Let every matrix of a block's experts be held by a form of its own while it trains.

    Returns the parametrisation of each stacked parameter. Raises :class:`UnsupportedModelError` for experts that are
    not kept in stacks, and what ``hold`` raises.
    """
    module: Any = block.experts
    made: dict[str, Stacked] = {}
    for name in _stacks(block):
        parts = 2 if name == "gate_up_proj" else 1
        stacked = Stacked(
            [form() for _ in range(parts)],
            transposed=bool(getattr(module, "is_transposed", False)),
            interleaved=not getattr(module, "is_concatenated", True),
        )
        # unsafe: the form may round or shrink at once, which is what it is for
        parametrize.register_parametrization(module, name, stacked, unsafe=True)
        made[name] = stacked
    return made


def settle(block: MoEBlock) -> None:
    """Plain weights in place of every form: the values the forms stand for now. Nothing to do where there are none."""
    for name in _stacks(block):
        if parametrize.is_parametrized(block.experts, name):
            values = getattr(block.experts, name).detach().clone()
            parametrize.remove_parametrizations(block.experts, name, leave_parametrized=True)
            delattr(block.experts, name)  # torch leaves a plain tensor there where nothing needed gradients
            block.experts.register_parameter(name, nn.Parameter(values))


def held(block: MoEBlock) -> Iterator[tuple[str, Form, tuple[Tensor, ...]]]:
    """(part, form, what it trains) for each matrix of a parametrised block; parts: gate, up, down."""
    for name in _stacks(block):
        if not parametrize.is_parametrized(block.experts, name):
            continue
        chain: Any = block.experts.parametrizations[name]
        originals = tuple(getattr(chain, f"original{i}") for i in range(chain.ntensors))
        parts = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}[name]
        for part, (form, tensors) in zip(parts, chain[0].grouped(originals), strict=True):
            yield part, form, tensors


def low_rank_bank(block: MoEBlock, dtype: torch.dtype) -> LowRankBank:
    """The factors and the remaining rows of experts trained as :class:`LowRankSparse`, as a bank to be stored.

    Raises :class:`UnsupportedModelError` where the block is not trained in that form.
    """
    found = list(held(block))
    if not found or not all(isinstance(form, LowRankSparse) for _, form, _ in found):
        raise UnsupportedModelError(f"the experts of {block.name} are not trained as low rank plus rows")
    experts: list[Mapping[str, Factors | Tensor]] = []
    for expert in range(block.num_experts):
        made: dict[str, Factors | Tensor] = {}
        for part, form, (left, right, rest) in found:
            rows = cast(LowRankSparse, form).keep[expert].nonzero()[:, 0]
            kept = (rows, rest[expert, rows].detach()) if len(rows) else (None, None)
            made[part] = Factors(left[expert].detach(), right[expert].detach(), *kept)
        experts.append(made)
    return LowRankBank.from_factors(experts, dtype=dtype, activation=block.bank().activation)


def _stacks(block: MoEBlock) -> list[str]:
    module = block.experts
    names = ["gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj", "down_proj"]
    shapes = [getattr(module, name, None) for name in names]
    if not all(isinstance(stack, Tensor) and stack.dim() == 3 for stack in shapes):
        raise UnsupportedModelError(
            f"{type(module).__name__} of {block.name} keeps its experts in no stacked parameters: they cannot be "
            "trained in a structured form"
        )
    return names
