"""Group-wise integers: every expert at a width of its own, packed to the bit.

Tensors of expert N, by the names they have on disk under the experts module (G = 2I if gated else I, C groups of a
row of K columns, c = :func:`~moekit.formats._grid.packed_columns`):

    N.gate_up.qweight uint8 [G, c(H)]     N.down.qweight uint8 [H, c(I)]
    N.gate_up.scales  bfloat16 [G, C(H)]  N.down.scales  bfloat16 [H, C(I)]
    N.gate_up.mins    bfloat16 [G, C(H)]  N.down.mins    bfloat16 [H, C(I)]
    N.gate_up.weight, N.down.weight       instead of these three where the expert is left as it was (16 bits)
    N.gate_up.bias [G], N.down.bias [H]   where the family has biases

A weight is ``q * scale + min`` (asymmetric, round to nearest). Where the group size does not divide a row, its last
group is short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation, ExpertBank, ExpertWeights
from ..errors import OptionError
from . import _grid
from .dense import DenseBank

WIDTHS = (2, 3, 4, 8, 16)
"""Bits an expert may have; 16 means left as it was, in the dtype it came in."""


@dataclass(frozen=True, eq=False)
class PackedBank(ExpertBank):
    """Experts as packed integers; ``bits`` and ``group_size`` hold one entry per expert. Built by :meth:`quantise`."""

    stored: Mapping[str, Tensor]
    bits: tuple[int, ...]
    group_size: tuple[int, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    activation: Activation = SILU_MUL

    @classmethod
    def quantise(cls, dense: DenseBank, bits: int | Sequence[int], group_size: int | Sequence[int] = 64) -> Self:
        """Round every expert of ``dense`` to the nearest points of its own grids.

        ``bits`` and ``group_size`` are one for all experts or one each. Raises :class:`OptionError` on a width that
        does not exist, a list of the wrong length, or weights that are NaN or infinite.
        """
        widths = _each(bits, dense.num_experts, "bits")
        sizes = _each(group_size, dense.num_experts, "group_size")
        stored: dict[str, Tensor] = {}
        for expert, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            weights = dense.expert(expert)
            for part, weight, bias in (
                ("gate_up", weights.gate_up, weights.gate_up_bias),
                ("down", weights.down, weights.down_bias),
            ):
                name = f"{expert}.{part}"
                stored |= {f"{name}.{k}": t for k, t in _quantise(weight.detach(), width, size, name).items()}
                if bias is not None:
                    stored[f"{name}.bias"] = bias.detach().clone()
        shape = (dense.hidden_size, dense.intermediate_size)
        return cls(stored, widths, sizes, shape, dense.dtype, dense.activation)

    @classmethod
    def allocate(
        cls,
        describe: Mapping[str, Any],
        hidden_size: int,
        intermediate_size: int,
        activation: Activation = SILU_MUL,
        device: torch.device | str | None = None,
    ) -> Self:
        """An uninitialised bank with exactly the tensors that ``describe`` (of :meth:`describe`) says; also on meta."""
        bits = _each(describe["bits"], None, "bits")
        sizes = _each(describe.get("group_size", 64), len(bits), "group_size")
        dtype = getattr(torch, describe.get("dtype", "bfloat16"))
        gated, bias = describe.get("gated", True), describe.get("bias", False)
        stored = {
            f"{expert}.{name}": torch.empty(shape, dtype=kind, device=device)
            for expert, (width, size) in enumerate(zip(bits, sizes, strict=True))
            for name, shape, kind in layout(hidden_size, intermediate_size, width, size, gated, bias, dtype)
        }
        return cls(stored, bits, sizes, (hidden_size, intermediate_size), dtype, activation)

    def describe(self) -> dict[str, Any]:
        """What :meth:`allocate` needs besides the sizes, ready for JSON."""
        return {
            "bits": list(self.bits),
            "group_size": list(self.group_size),
            "dtype": str(self.dtype).removeprefix("torch."),
            "gated": self.activation.gated,
            "bias": "0.down.bias" in self.stored,
        }

    @property
    def num_experts(self) -> int:
        return len(self.bits)

    @property
    def hidden_size(self) -> int:
        return self.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.shape[1]

    def tensors(self) -> Mapping[str, Tensor]:
        return self.stored

    def expert(self, index: int) -> ExpertWeights:
        """One expert, decoded to the dtype the bank was made from."""
        if not 0 <= index < self.num_experts:
            raise OptionError(f"expert {index} does not exist: this bank has experts 0 to {self.num_experts - 1}")
        bias = (self.stored.get(f"{index}.{part}.bias") for part in ("gate_up", "down"))
        return ExpertWeights(self.matrix(index, "gate_up"), self.matrix(index, "down"), *bias)

    def matrix(self, expert: int, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """One decoded matrix of one expert; ``part`` is "gate_up" or "down"."""
        name, dtype = f"{expert}.{part}", dtype or self.dtype
        if self.bits[expert] == 16:
            return self.stored[f"{name}.weight"].to(dtype)
        columns = self.hidden_size if part == "gate_up" else self.intermediate_size
        integers = _grid.unpack(self.stored[f"{name}.qweight"], self.bits[expert], columns)
        scales, mins = self.stored[f"{name}.scales"], self.stored[f"{name}.mins"]
        return _grid.decode(integers, scales, mins, self.group_size[expert], dtype)

    def dequantise(self) -> DenseBank:
        """The same experts as floating-point weights."""
        return DenseBank.stack([self.expert(e) for e in range(self.num_experts)], self.activation)

    def select(self, experts: Sequence[int]) -> Self:
        wrong = [e for e in experts if not 0 <= e < self.num_experts]
        if wrong:
            raise OptionError(f"expert {wrong[0]} does not exist: this bank has experts 0 to {self.num_experts - 1}")
        of_expert: dict[int, dict[str, Tensor]] = {e: {} for e in range(self.num_experts)}
        for name, tensor in self.stored.items():
            expert, _, rest = name.partition(".")
            of_expert[int(expert)][rest] = tensor
        stored = {f"{new}.{rest}": t for new, old in enumerate(experts) for rest, t in of_expert[old].items()}
        bits, sizes = (tuple(values[e] for e in experts) for values in (self.bits, self.group_size))
        return replace(self, stored=stored, bits=bits, group_size=sizes)


def layout(
    hidden_size: int, intermediate_size: int, bits: int, group_size: int, gated: bool, bias: bool, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of every tensor of one expert, without the expert's number."""
    up_rows = 2 * intermediate_size if gated else intermediate_size
    for part, rows, columns in (("gate_up", up_rows, hidden_size), ("down", hidden_size, intermediate_size)):
        if bits == 16:
            yield f"{part}.weight", (rows, columns), dtype
        else:
            yield f"{part}.qweight", (rows, _grid.packed_columns(columns, bits)), torch.uint8
            for name in ("scales", "mins"):
                yield f"{part}.{name}", (rows, _grid.groups(columns, group_size)), _grid.SCALE
        if bias:
            yield f"{part}.bias", (rows,), dtype


def packed_nbytes(
    hidden_size: int,
    intermediate_size: int,
    bits: int,
    group_size: int = 64,
    gated: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Exact bytes of one stored expert; ``dtype`` is that of the source (it sizes biases and 16-bit experts)."""
    _each([bits], 1, "bits")
    _each([group_size], 1, "group_size")
    shapes = layout(hidden_size, intermediate_size, bits, group_size, gated, bias, dtype)
    return sum(torch.Size(shape).numel() * kind.itemsize for _, shape, kind in shapes)


def _quantise(weight: Tensor, bits: int, group_size: int, name: str) -> dict[str, Tensor]:
    if bits == 16:
        return {"weight": weight.clone()}
    if not torch.isfinite(weight).all():
        raise OptionError(f"expert weights {name} hold NaN or infinite values: they cannot be quantised")
    integers, scales, mins = _grid.fit(weight, bits, group_size)
    return {"qweight": _grid.pack(integers, bits), "scales": scales, "mins": mins}


def _each(value: int | Sequence[int], count: int | None, what: str) -> tuple[int, ...]:
    values = (value,) * (count or 1) if isinstance(value, int) else tuple(value)
    if count is not None and len(values) != count:
        raise OptionError(f"{what} lists {len(values)} experts, but the bank has {count}: give one number or one each")
    for number in values:
        if what == "bits" and number not in WIDTHS:
            raise OptionError(
                f"bits={number} is not a width experts can have: use one of {', '.join(map(str, WIDTHS))}"
            )
        if what == "group_size" and number < 1:
            raise OptionError(f"group_size={number} is not possible: it must be at least 1 (64 is usual)")
    return values
