"""Nested widths: an expert stored once serves every number of bits from its base up (matryoshka quantisation).

Tensors of expert N for its matrices [R, K] "gate_up" and "down" (C groups of a row, c the bytes of a packed row):

    N.part.qweight uint8 [R, c]                     the base, ``q * scale + min``, as of packed integers
    N.part.scales, N.part.mins bfloat16 [R, C]
    N.part.signB uint8 [R, ceil(K / 8)]             for every width B above the base: one bit a weight, 0 is minus ...
    N.part.stepB bfloat16 [R, C]                    ... and what it adds or takes away in each group
    N.gate_up.bias [G], N.down.bias [H]             where the family has biases

A weight at B bits is the base and the planes up to B, added in that order. Source: D2MoE (arXiv 2504.15299),
equations 2-5; without data the step of a plane is the mean of what is left to correct, the least squares for signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation
from ..errors import OptionError
from . import _grid
from ._stored import Spec, StoredBank, biases, each, finite, given_biases, matrices
from .dense import DenseBank
from .packed import Codes, code_leaves

BASES, WIDEST = (1, 2, 3, 4), 8


class Plane(NamedTuple):
    """One more bit of a matrix: ``signs`` [R, K] of 0 (minus) and 1 (plus), ``steps`` [R, C], bfloat16 numbers."""

    signs: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False)
class NestedBank(StoredBank):
    """``bits`` and ``group_size`` hold one entry per expert, ``base_bits`` is of the bank.

    Built by :meth:`quantise` or :meth:`from_planes`; :meth:`at` reads it at fewer bits.
    """

    FORMAT: ClassVar[str] = "nested"
    PARTS: ClassVar[tuple[str, ...]] = ("gate_up", "down")
    EACH: ClassVar[tuple[str, ...]] = ("bits", "group_size")
    WHOLE: ClassVar[tuple[str, ...]] = ("base_bits",)

    stored: Mapping[str, Tensor]
    bits: tuple[int, ...]
    group_size: tuple[int, ...]
    base_bits: int
    shape: tuple[int, int]
    dtype: torch.dtype
    activation: Activation = SILU_MUL

    @classmethod
    def quantise(
        cls,
        dense: DenseBank,
        bits: int | Sequence[int] = 4,
        base_bits: int = 2,
        group_size: int | Sequence[int] = 128,
    ) -> Self:
        """Round to the base, then what is left to one sign after another; ``bits`` and ``group_size`` one or one each.

        Raises :class:`OptionError` on widths that cannot be, or weights that are NaN or infinite.
        """
        widths = each(bits, dense.num_experts, "bits")
        sizes = each(group_size, dense.num_experts, "group_size")
        for width in widths:
            _check_width(base_bits, width)
        _grid.check_group_size(*sizes)
        experts = [
            {
                part: _planes(finite(weight, f"{e}.{part}"), base_bits, widths[e], sizes[e])
                for part, weight in matrices(dense.expert(e), cls.PARTS).items()
            }
            for e in range(dense.num_experts)
        ]
        bank = cls.from_planes(experts, base_bits, sizes, dtype=dense.dtype, activation=dense.activation)
        return replace(bank, stored={**bank.stored, **biases(dense)})

    @classmethod
    def from_planes(
        cls,
        experts: Sequence[Mapping[str, tuple[Codes, Sequence[Plane]]]],
        base_bits: int,
        group_size: int | Sequence[int],
        *,
        dtype: torch.dtype,
        activation: Activation = SILU_MUL,
        biases: Sequence[Mapping[str, Tensor]] = (),
    ) -> Self:
        """A bank of given bases and planes, those in ascending order, for "gate_up" and "down" of each expert.

        Nothing is rounded. Raises :class:`OptionError` on integers that do not fit, scales or steps that are no
        bfloat16 numbers, and shapes that contradict.
        """
        if not experts:
            raise OptionError("a bank needs at least one expert, got none")
        stored, widths = given_biases(biases), []
        for expert, given in enumerate(experts):
            for part in cls.PARTS:
                (base, planes), name = given[part], f"{expert}.{part}"
                stored |= code_leaves(name, base, base_bits)
                for width, plane in enumerate(planes, base_bits + 1):
                    if not ((plane.signs == 0) | (plane.signs == 1)).all():
                        raise OptionError(f"signs of {name} must be 0 (minus) or 1 (plus)")
                    stored[f"{name}.sign{width}"] = _grid.pack(plane.signs.to(torch.uint8), 1)
                    stored[f"{name}.step{width}"] = _grid.exactly(plane.steps, f"steps of {name}")
            widths.append(base_bits + len(given["down"][1]))
        hidden, inner = experts[0]["down"][0].integers.shape
        sizes = each(group_size, len(experts), "group_size")
        return cls(stored, tuple(widths), sizes, base_bits, (hidden, inner), dtype, activation).checked()

    def at(self, bits: int | Sequence[int]) -> Self:
        """The same bytes read at fewer bits (one for all or one each): planes are left out, nothing is copied.

        Raises :class:`OptionError` on a width that an expert does not hold.
        """
        widths = each(bits, self.num_experts, "bits")
        for expert, (wanted, held) in enumerate(zip(widths, self.bits, strict=True)):
            if not self.base_bits <= wanted <= held:
                raise OptionError(f"expert {expert} holds {self.base_bits} to {held} bits, not {wanted}")
        bank = replace(self, bits=widths)
        names = [name for name, _, _ in bank.layout()] + [name for name in self.stored if name.endswith(".bias")]
        return replace(bank, stored={name: self.stored[name] for name in names})

    def layout(self) -> Iterator[Spec]:
        _grid.check_group_size(*self.group_size)
        for expert, (bits, group_size) in enumerate(zip(self.bits, self.group_size, strict=True)):
            _check_width(self.base_bits, bits)
            for part in self.PARTS:
                (rows, columns), name = self.size(part), f"{expert}.{part}"
                groups = (rows, _grid.groups(columns, group_size))
                yield f"{name}.qweight", (rows, _grid.packed_columns(columns, self.base_bits)), torch.uint8
                yield f"{name}.scales", groups, _grid.SCALE
                yield f"{name}.mins", groups, _grid.SCALE
                for width in range(self.base_bits + 1, bits + 1):
                    yield f"{name}.sign{width}", (rows, _grid.packed_columns(columns, 1)), torch.uint8
                    yield f"{name}.step{width}", groups, _grid.SCALE

    def levels(self, expert: int, part: str) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """The base and then every plane of a matrix, as (bits, packed integers, scales, mins): their sum is decoded."""
        name = f"{expert}.{part}"
        packed, scales, mins = (self.stored[f"{name}.{leaf}"] for leaf in ("qweight", "scales", "mins"))
        found = [(self.base_bits, packed, scales, mins)]
        for width in range(self.base_bits + 1, self.bits[expert] + 1):
            steps = self.stored[f"{name}.step{width}"]
            found.append((1, self.stored[f"{name}.sign{width}"], 2 * steps, -steps))
        return found

    def some(self, expert: int, part: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix, decoded in float32 or wider and rounded once."""
        columns, wide = self.size(part)[1], torch.promote_types(dtype, torch.float32)
        weight: Tensor | None = None
        for bits, packed, scales, mins in self.levels(expert, part):
            integers = _grid.unpack(packed[rows], bits, columns)
            level = _grid.decode(integers, scales[rows], mins[rows], self.group_size[expert], wide)
            weight = level if weight is None else weight.add_(level)
        assert weight is not None
        return weight.to(dtype)

    def _decode(self, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        return self.some(expert, part, slice(None), dtype)


def _planes(weight: Tensor, base_bits: int, bits: int, group_size: int) -> tuple[Codes, list[Plane]]:
    base = Codes(*_grid.fit(weight, base_bits, group_size))
    rest = weight.float() - _grid.decode(*base, group_size, torch.float32)
    planes = []
    for _ in range(bits - base_bits):
        signs = (rest >= 0).to(torch.uint8)
        steps = _grid.group_mean(_grid.grouped(rest.abs(), group_size), weight.shape[1]).to(_grid.SCALE)
        rest = rest - _signed(signs, steps, group_size)
        planes.append(Plane(signs, steps))
    return base, planes


def _signed(signs_NK: Tensor, steps_NC: Tensor, group_size: int) -> Tensor:
    """float32 [N, K]: each group's step, with the sign of each weight."""
    return _grid.decode(signs_NK, 2 * steps_NC.float(), -steps_NC.float(), group_size, torch.float32)


def _check_width(base_bits: int, bits: int) -> None:
    if base_bits not in BASES:
        raise OptionError(f"base_bits={base_bits} is not possible: a base has {BASES[0]} to {BASES[-1]} bits")
    if not base_bits <= bits <= WIDEST:
        raise OptionError(f"bits={bits} is not possible on a base of {base_bits}: use {base_bits} to {WIDEST}")
