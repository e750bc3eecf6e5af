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
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation
from ..errors import OptionError
from . import _grid
from ._stored import Spec, StoredBank, biases, each, finite, given_biases, matrices, own
from .dense import DenseBank

WIDTHS = (1, 2, 3, 4, 8, 16)
"""Bits an expert may have; 16 means left as it was, in the dtype it came in."""


class Codes(NamedTuple):
    """A matrix that is on a grid already: ``integers`` [N, K] below 2**bits, ``scales`` and ``mins`` [N, C].

    The scales must be bfloat16 numbers (in any dtype): a quantiser that corrects its own errors has to see the very
    grid that is stored.
    """

    integers: Tensor
    scales: Tensor
    mins: Tensor


@dataclass(frozen=True, eq=False)
class PackedBank(StoredBank):
    """Experts as packed integers; ``bits`` and ``group_size`` hold one entry per expert.

    Built by :meth:`quantise` or :meth:`from_codes`.
    """

    FORMAT: ClassVar[str] = "packed"
    PARTS: ClassVar[tuple[str, ...]] = ("gate_up", "down")
    EACH: ClassVar[tuple[str, ...]] = ("bits", "group_size")

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
        widths, sizes = _numbers(bits, group_size, dense.num_experts)
        stored: dict[str, Tensor] = {}
        for expert, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            for part, weight in matrices(dense.expert(expert), cls.PARTS).items():
                name = f"{expert}.{part}"
                made: Codes | Tensor = weight if width == 16 else _codes(weight, width, size, name)
                stored |= _stored(name, made, width)
        shape = (dense.hidden_size, dense.intermediate_size)
        return cls(stored | biases(dense), widths, sizes, shape, dense.dtype, dense.activation)

    @classmethod
    def from_codes(
        cls,
        experts: Sequence[Mapping[str, Codes | Tensor]],
        bits: int | Sequence[int],
        group_size: int | Sequence[int] = 64,
        *,
        dtype: torch.dtype,
        activation: Activation = SILU_MUL,
        biases: Sequence[Mapping[str, Tensor]] = (),
    ) -> Self:
        """A bank of matrices that were quantised elsewhere; nothing is rounded again.

        ``experts`` gives "gate_up" and "down" of each as :class:`Codes`, or as a plain weight where ``bits`` is 16;
        ``biases`` likewise, where there are any. ``dtype`` is that of the source and of what is decoded.

        Raises:
            OptionError: integers that need more bits, scales that are no bfloat16 numbers, shapes that contradict.
        """
        if not experts:
            raise OptionError("a bank needs at least one expert, got none")
        widths, sizes = _numbers(bits, group_size, len(experts))
        stored = given_biases(biases)
        for expert, parts in enumerate(experts):
            for part in cls.PARTS:
                stored |= _stored(f"{expert}.{part}", parts[part], widths[expert])
        down = experts[0]["down"]
        rows, columns = (down.integers if isinstance(down, Codes) else down).shape
        return cls(stored, widths, sizes, (rows, columns), dtype, activation).checked()

    @classmethod
    def _fields(cls, describe: Mapping[str, Any], gated: bool) -> dict[str, Any]:
        bits = describe["bits"]
        count = len(bits) if isinstance(bits, Sequence) else 1
        return dict(zip(cls.EACH, _numbers(bits, describe.get("group_size", 64), count), strict=True))

    def describe(self) -> dict[str, Any]:
        """As of every format, but for its name: a description without one is of packed integers."""
        return {key: value for key, value in super().describe().items() if key != "format"}

    def layout(self) -> Iterator[Spec]:
        for expert, (bits, group_size) in enumerate(zip(self.bits, self.group_size, strict=True)):
            for part in self.PARTS:
                for leaf, shape, dtype in _layout(*self.size(part), bits, group_size, self.dtype):
                    yield f"{expert}.{part}.{leaf}", shape, dtype

    def _decode(self, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        name = f"{expert}.{part}"
        if self.bits[expert] == 16:
            return self.stored[f"{name}.weight"].to(dtype)
        integers = _grid.unpack(self.stored[f"{name}.qweight"], self.bits[expert], self.size(part)[1])
        scales, mins = self.stored[f"{name}.scales"], self.stored[f"{name}.mins"]
        return _grid.decode(integers, scales, mins, self.group_size[expert], dtype)


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
    _numbers(bits, group_size, 1)
    up_rows, total = 2 * intermediate_size if gated else intermediate_size, 0
    for rows, columns in ((up_rows, hidden_size), (hidden_size, intermediate_size)):
        shapes = _layout(rows, columns, bits, group_size, dtype)
        total += sum(torch.Size(shape).numel() * kind.itemsize for _, shape, kind in shapes)
        total += rows * dtype.itemsize if bias else 0
    return total


def _layout(rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype) -> Iterator[Spec]:
    """The tensors of one matrix, by leaf."""
    if bits == 16:
        yield "weight", (rows, columns), dtype
        return
    yield "qweight", (rows, _grid.packed_columns(columns, bits)), torch.uint8
    for leaf in ("scales", "mins"):
        yield leaf, (rows, _grid.groups(columns, group_size)), _grid.SCALE


def _codes(weight: Tensor, bits: int, group_size: int, name: str) -> Codes:
    return Codes(*_grid.fit(finite(weight, name), bits, group_size))


def _stored(name: str, made: Codes | Tensor, bits: int) -> dict[str, Tensor]:
    if isinstance(made, Codes) != (bits < 16):
        raise OptionError(f"expert weights {name} at bits={bits} must be {'codes' if bits < 16 else 'a plain weight'}")
    return code_leaves(name, made, bits) if isinstance(made, Codes) else {f"{name}.weight": own(made, made.dtype)}


def code_leaves(name: str, made: Codes, bits: int) -> dict[str, Tensor]:
    """The stored tensors of a matrix that is on a grid; raises :class:`OptionError` where it is not."""
    highest = int(made.integers.max()) if made.integers.numel() else 0
    if highest >= 2**bits or int(made.integers.min()) < 0:
        raise OptionError(f"{name} holds the integer {highest}, but {bits} bits hold 0 to {2**bits - 1}")
    return {
        f"{name}.qweight": _grid.pack(made.integers.to(torch.uint8), bits),
        f"{name}.scales": _grid.exactly(made.scales, f"scales of {name}"),
        f"{name}.mins": _grid.exactly(made.mins, f"mins of {name}"),
    }


def _numbers(bits: Any, group_size: Any, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bits and group sizes as one each, once they are found possible."""
    widths, sizes = each(bits, count, "bits"), each(group_size, count, "group_size")
    for number in widths:
        if number not in WIDTHS:
            raise OptionError(
                f"bits={number} is not a width experts can have: use one of {', '.join(map(str, WIDTHS))}"
            )
    _grid.check_group_size(*sizes)
    return widths, sizes
