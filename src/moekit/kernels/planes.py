"""Products on ternary and nested experts: fused where the machine can, else decoded a tile at a time, never kept.

Fused kernels read nested experts where they lie, and ternary ones at two bits a weight, to which the codes are
expanded once: following the codes anew for every token took three times as long.
Without them, but with Numba, tiles are decoded in one pass, and one or two rows are multiplied without decoding at all:
ternary codes name the weights that are not zero, so only those are visited. Shapes by suffix: M rows, N output and K
input columns of a product.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..formats import NestedBank, TernaryBank, _code
from . import stored_matrices
from ._tiles import TILE
from .fused import Fused, Matrices

FEW_ROWS = 2
"""Rows up to which compiled kernels multiply codes directly: decoding a tile costs as much as two such products."""

Finish = Callable[[Tensor], Tensor]


class _Decoded:
    """Both products of every expert, whose matrices a format decodes some rows at a time; in float32 or wider."""

    def __init__(self, bank: Any, finish: Finish | None = None) -> None:
        self.bank = bank
        self.finish = finish
        self.num_experts, self.activation = bank.num_experts, bank.activation
        self.fused: Fused | None = None
        if unfit(bank) is None:
            up, down = (self._matrices(part) for part in bank.PARTS)
            self.fused = Fused(up, down, bank.activation, finish)

    def _matrices(self, part: str) -> Matrices:
        """One part of every expert for the fused kernels."""
        raise NotImplementedError

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return torch.promote_types(x_TH.dtype, torch.float32)

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return self._product(x_MH, expert, "gate_up")

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._product(h_MI, expert, "down")

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        return self.down(expert, self.activation(self.up(expert, x_MH)))

    def _product(self, x_MK: Tensor, expert: int, part: str) -> Tensor:
        rows, columns = self.bank.size(part)
        out = x_MK.new_empty(len(x_MK), rows)
        usable = out.device.type == "cpu" and out.dtype == torch.float32 and self._fits(expert, part)
        compiled = jit() if usable else None
        if compiled and len(x_MK) <= FEW_ROWS:
            for x_K, out_N in zip(x_MK, out, strict=True):
                self._row(compiled, expert, part, x_K, out_N)
        else:
            x_MK = self._ordered(x_MK) if compiled else x_MK
            step = max(64, TILE // columns)
            buffer = x_MK.new_empty(min(step, rows), columns)
            for start in range(0, rows, step):
                some = slice(start, min(start + step, rows))
                tile = buffer[: some.stop - start]
                if compiled:
                    self._fill(compiled, expert, part, some, tile)
                else:
                    tile.copy_(self.bank.some(expert, part, some, tile.dtype))
                torch.mm(x_MK, tile.t(), out=out[:, some])
        bias = self.bank.stored.get(f"{expert}.{part}.bias")
        return out if bias is None else out.add_(bias)

    def _fits(self, expert: int, part: str) -> bool:
        """Whether compiled kernels can take a matrix."""
        return True

    def _ordered(self, x_MK: Tensor) -> Tensor:
        """x with its columns in the order in which compiled kernels decode them."""
        return x_MK

    def _row(self, compiled: Any, expert: int, part: str, x_K: Tensor, out_N: Tensor) -> None:
        """One row of the product, without decoding."""
        raise NotImplementedError

    def _fill(self, compiled: Any, expert: int, part: str, some: slice, tile_NK: Tensor) -> None:
        """Some rows of a matrix, decoded in one pass."""
        raise NotImplementedError


class TernaryProducts(_Decoded):
    """Products on a :class:`TernaryBank`, from its codes."""

    bank: TernaryBank

    def __init__(self, bank: TernaryBank, finish: Finish | None = None) -> None:
        self._checked: set[tuple[int, str]] = set()
        super().__init__(bank, finish)

    def _matrices(self, part: str) -> Matrices:
        return stored_matrices.ternary(self.bank, part)

    def _product(self, x_MK: Tensor, expert: int, part: str) -> Tensor:
        # compiled loops follow the codes without looking at bounds, and a file may hold anything
        if (expert, part) not in self._checked:
            self.bank.check_codes(expert, part)
            self._checked.add((expert, part))
        return super()._product(x_MK, expert, part)

    def _row(self, compiled: Any, expert: int, part: str, x_K: Tensor, out_N: Tensor) -> None:
        compiled.ternary_row(*self._arrays(expert, part, slice(0, len(out_N))), x_K.numpy(), out_N.numpy())

    def _fill(self, compiled: Any, expert: int, part: str, some: slice, tile_NK: Tensor) -> None:
        compiled.ternary_fill(*self._arrays(expert, part, some), tile_NK.numpy())

    def _arrays(self, expert: int, part: str, some: slice) -> tuple[Any, ...]:
        """All codes of a matrix, where those of some rows are, the rows' levels, and what a code stands for."""
        name = f"{expert}.{part}"
        codes, offsets, levels = (self.bank.stored[f"{name}.{leaf}"] for leaf in ("codes", "offsets", "levels"))
        padded = torch.nn.functional.pad(levels[some].float(), (1, 1))
        where = offsets[some.start : some.stop + 1]
        return codes.numpy(), where.numpy(), padded.numpy(), _code.dictionary().entries


class NestedProducts(_Decoded):
    """Products on a :class:`NestedBank`, at the bits each expert has in it.

    Compiled, columns are taken in the order 0, 8, 16 ... 1, 9, 17 ...: neighbours in a register then come from
    neighbouring bytes.
    """

    bank: NestedBank

    def _matrices(self, part: str) -> Matrices:
        return stored_matrices.nested(self.bank, part)

    def _fits(self, expert: int, part: str) -> bool:
        """Whether groups divide the row, and units of 8 columns the groups."""
        group = self.bank.group_size[expert]
        return not (group % 8 or self.bank.size(part)[1] % group)

    def _ordered(self, x_MK: Tensor) -> Tensor:
        return x_MK.view(len(x_MK), -1, 8).transpose(1, 2).reshape(x_MK.shape)

    def _row(self, compiled: Any, expert: int, part: str, x_K: Tensor, out_N: Tensor) -> None:
        group = self.bank.group_size[expert]
        x, sums = x_K.view(-1, 8).t().contiguous().numpy(), x_K.view(-1, group).sum(1).numpy()
        out_N.zero_()
        for bits, *arrays in self._levels(expert, part, slice(None)):
            _, row = compiled.level(bits)
            row(*arrays, x, sums, out_N.numpy(), group // 8)

    def _fill(self, compiled: Any, expert: int, part: str, some: slice, tile_NK: Tensor) -> None:
        tile_NK.zero_()
        for bits, *arrays in self._levels(expert, part, some):
            add, _ = compiled.level(bits)
            add(*arrays, tile_NK.view(len(tile_NK), 8, -1).numpy(), self.bank.group_size[expert] // 8)

    def _levels(self, expert: int, part: str, some: slice) -> Iterator[tuple[Any, ...]]:
        """(bits, packed integers, scales, mins) of the base and every plane."""
        for bits, packed, scales, mins in self.bank.levels(expert, part):
            yield bits, packed[some].numpy(), scales[some].float().numpy(), mins[some].float().numpy()


def unfit(bank: TernaryBank | NestedBank) -> str | None:
    """Why the fused kernels cannot run a bank, or None."""
    groups = bank.group_size if isinstance(bank, NestedBank) else ()
    return stored_matrices.unfit(bank, dict(enumerate(groups)))


def expanded_nbytes(bank: TernaryBank) -> int:
    """Bytes that fused kernels keep beside the codes: two bits a weight."""
    return bank.num_experts * sum(rows * columns // 4 for rows, columns in map(bank.size, bank.PARTS))


@cache
def jit() -> Any:
    """The module of compiled kernels, or None where Numba is not installed."""
    return importlib.import_module("moekit.kernels._planes_jit") if importlib.util.find_spec("numba") else None
