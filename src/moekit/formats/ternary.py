"""Ternary experts in less than a bit per weight: two levels per row and zero, coded by a fixed dictionary.

Tensors of expert N for its matrices [R, K] "gate_up" and "down" (Q codes, as many as its weights need):

    N.part.codes uint16 [Q]        runs of weights, each row from a code of its own (see ``formats/_code.py``)
    N.part.offsets int32 [R + 1]   the first code of every row, then Q
    N.part.levels bfloat16 [R, 2]  what the two symbols stand for: low, high; the third is zero
    N.gate_up.bias [G], N.down.bias [H]   where the family has biases

The levels of QMoE (arXiv 2310.16795) are the least and the greatest weight of a row, which leaves most weights zero;
-a and a everywhere (BitNet b1.58, arXiv 2402.17764) is the same format, but its many non-zero weights take more bits:
the code pays from about 82 % zeros on. :meth:`TernaryBank.bits_per_weight` says what was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation
from ..errors import CheckpointError, OptionError
from . import _code, _grid
from ._stored import Spec, StoredBank, biases, finite, given_biases, matrices
from .dense import DenseBank


class Ternary(NamedTuple):
    """A ternary matrix: ``symbols`` [R, K] of -1, 0 and 1; ``low`` and ``high`` [R] are what -1 and 1 stand for.

    The levels must be bfloat16 numbers (in any dtype).
    """

    symbols: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def nearest(cls, weight_RK: Tensor) -> Self:
        """Each weight at the nearest of its row's least weight, zero and its greatest weight (QMoE, "1.5 bit")."""
        wide = weight_RK.float()
        low = wide.amin(1).clamp(max=0).to(_grid.SCALE)
        high = wide.amax(1).clamp(min=0).to(_grid.SCALE)
        above, below = wide > high.float()[:, None] / 2, wide < low.float()[:, None] / 2
        return cls(above.to(torch.int8) - below.to(torch.int8), low, high)

    @classmethod
    def exact(cls, weight_RK: Tensor, name: str = "the matrix") -> Self:
        """A matrix whose rows hold at most two values besides zero, as trained or rounded elsewhere.

        Levels are told by their values, never by which symbol a row happens to use. Raises :class:`OptionError` on
        more values, or values that are no bfloat16 numbers.
        """
        wide = weight_RK.to(torch.promote_types(weight_RK.dtype, torch.float32))
        used = wide != 0
        low = wide.masked_fill(~used, torch.inf).amin(1)
        high = wide.masked_fill(~used, -torch.inf).amax(1)
        wrong = (used & (wide != low[:, None]) & (wide != high[:, None])).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise OptionError(
                f"row {row} of {name} holds {len(wide[row][used[row]].unique())} values besides zero: "
                "ternary rows hold at most two"
            )
        single = low == high
        low = low.masked_fill(~used.any(1) | (single & (low > 0)), 0)
        high = high.masked_fill(~used.any(1) | (single & (high < 0)), 0)
        up = used & (wide == high[:, None])
        return cls(up.to(torch.int8) - (used & ~up).to(torch.int8), low, high)


@dataclass(frozen=True, eq=False)
class TernaryBank(StoredBank):
    """``codes`` maps a part to the number of codes of every expert: how many there are depends on the weights.

    Built by :meth:`quantise`, :meth:`exact` or :meth:`from_symbols`.
    """

    FORMAT: ClassVar[str] = "ternary"
    PARTS: ClassVar[tuple[str, ...]] = ("gate_up", "down")
    EACH_PART: ClassVar[tuple[str, ...]] = ("codes",)

    stored: Mapping[str, Tensor]
    codes: Mapping[str, tuple[int, ...]]
    shape: tuple[int, int]
    dtype: torch.dtype
    activation: Activation = SILU_MUL

    @classmethod
    def quantise(cls, dense: DenseBank) -> Self:
        """Round every weight to its row's least, zero or greatest. Raises :class:`OptionError` on NaN or infinity."""
        return cls._made(dense, lambda weight, name: Ternary.nearest(finite(weight, name)))

    @classmethod
    def exact(cls, dense: DenseBank) -> Self:
        """A bank that is ternary already, stored without a change (see :meth:`Ternary.exact`)."""
        return cls._made(dense, lambda weight, name: Ternary.exact(finite(weight, name), name))

    @classmethod
    def from_symbols(
        cls,
        experts: Sequence[Mapping[str, Ternary]],
        *,
        dtype: torch.dtype,
        activation: Activation = SILU_MUL,
        biases: Sequence[Mapping[str, Tensor]] = (),
    ) -> Self:
        """A bank of given matrices ("gate_up" and "down" of each expert); nothing is rounded.

        Raises :class:`OptionError` on other symbols, levels that are no bfloat16 numbers, shapes that contradict.
        """
        if not experts:
            raise OptionError("a bank needs at least one expert, got none")
        stored = given_biases(biases)
        counts: dict[str, list[int]] = {part: [] for part in cls.PARTS}
        hidden, inner = experts[0]["down"].symbols.shape
        empty = cls({}, {}, (hidden, inner), dtype, activation)
        for expert, given in enumerate(experts):
            for part in cls.PARTS:
                leaves = _leaves(given[part], f"{expert}.{part}", empty.size(part))
                stored |= {f"{expert}.{part}.{leaf}": tensor for leaf, tensor in leaves.items()}
                counts[part].append(len(leaves["codes"]))
        codes = {part: tuple(numbers) for part, numbers in counts.items()}
        return replace(empty, stored=stored, codes=codes).checked()

    def bits_per_weight(self) -> float:
        """Bits per weight of the matrices, with offsets and levels, without biases."""
        nbytes = sum(t.nbytes for name, t in self.stored.items() if not name.endswith(".bias"))
        return 8 * nbytes / self._weights()

    def zeros(self) -> float:
        """Share of the weights that are zero."""
        parts = [(f"{e}.{p}.codes", self.size(p)) for e in range(self.num_experts) for p in self.PARTS]
        return sum(_code.zeros(self.stored[name], *size) for name, size in parts) / self._weights()

    def layout(self) -> Iterator[Spec]:
        for part in self.PARTS:
            rows, columns = self.size(part)
            for expert, count in enumerate(self.codes[part]):
                if not rows * -(-columns // (2 * _code.PAIRS)) <= count <= rows * -(-columns // 2):
                    raise OptionError(f"codes={count} is not possible for {expert}.{part} [{rows}, {columns}]")
                yield f"{expert}.{part}.codes", (count,), torch.uint16
                yield f"{expert}.{part}.offsets", (rows + 1,), torch.int32
                yield f"{expert}.{part}.levels", (rows, 2), _grid.SCALE

    @classmethod
    def _made(cls, dense: DenseBank, rounding: Callable[[Tensor, str], Ternary]) -> Self:
        experts = [
            {part: rounding(weight, f"{e}.{part}") for part, weight in matrices(dense.expert(e), cls.PARTS).items()}
            for e in range(dense.num_experts)
        ]
        bank = cls.from_symbols(experts, dtype=dense.dtype, activation=dense.activation)
        return replace(bank, stored={**bank.stored, **biases(dense)})

    def check_codes(self, expert: int, part: str) -> None:
        """Raises :class:`CheckpointError` where the codes of a matrix do not add up to its rows."""
        codes, offsets = (self.stored[f"{expert}.{part}.{leaf}"] for leaf in ("codes", "offsets"))
        if not _code.sound(codes, offsets, self.size(part)[1]):
            raise self._damaged(expert, part)

    def symbols(self, expert: int, part: str) -> Tensor:
        """A matrix at two bits a weight, uint8 [R, K / 4], low bits first: 0 is zero, 1 the low level, 2 the high.

        K must be a multiple of 4. Raises :class:`CheckpointError` as :meth:`check_codes` does.
        """
        codes, offsets = (self.stored[f"{expert}.{part}.{leaf}"] for leaf in ("codes", "offsets"))
        found = _code.unpack(codes, offsets, self.size(part)[1])
        if found is None:
            raise self._damaged(expert, part)
        return found

    def _damaged(self, expert: int, part: str) -> CheckpointError:
        return CheckpointError(
            f"the codes of {expert}.{part} do not add up to rows of {self.size(part)[1]} weights: "
            "the file is damaged, or was written by something else"
        )

    def some(self, expert: int, part: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix, decoded; only their codes are read, and not checked."""
        name = f"{expert}.{part}"
        first, last, _ = rows.indices(self.size(part)[0])
        offsets = self.stored[f"{name}.offsets"]
        codes = self.stored[f"{name}.codes"][int(offsets[first]) : int(offsets[last])]
        symbols = _code.decode(codes, last - first, self.size(part)[1]).long()
        levels = self.stored[f"{name}.levels"][first:last].to(dtype)
        return torch.cat([torch.zeros_like(levels[:, :1]), levels], dim=1).gather(1, symbols)

    def _decode(self, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        self.check_codes(expert, part)
        return self.some(expert, part, slice(None), dtype)

    def _weights(self) -> int:
        return self.num_experts * sum(rows * columns for rows, columns in map(self.size, self.PARTS))


def _leaves(made: Ternary, name: str, size: tuple[int, int]) -> dict[str, Tensor]:
    found = [tuple(tensor.shape) for tensor in made]
    if found != [size, size[:1], size[:1]]:
        raise OptionError(f"{name} needs symbols {size} and levels {size[:1]}, got {', '.join(map(str, found))}")
    if not ((made.symbols >= -1) & (made.symbols <= 1)).all():
        raise OptionError(f"symbols of {name} must be -1, 0 or 1")
    symbols = made.symbols.to(torch.int8)
    codes, offsets = _code.encode(torch.where(symbols < 0, 1, 2 * symbols))
    levels = torch.stack([_grid.exactly(made.low, f"{name} low"), _grid.exactly(made.high, f"{name} high")], dim=1)
    return {"codes": codes, "offsets": offsets, "levels": levels}
