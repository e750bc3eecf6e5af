"""Low rank, and low rank plus some whole rows: every matrix of every expert at a rank of its own.

Tensors of expert N for each of its matrices (part "gate", "up" [I, H] and "down" [H, I]; r its rank, n its rows):

    N.part.left [R, r], N.part.right [r, K]   the matrix is left @ right ...
    N.part.rows int32 [n], N.part.sparse [n, K]   ... plus these whole rows, ascending (structured remainder); n > 0
    N.part.weight [R, K]                      instead of all these where the matrix is left as it was (no rank)
    N.gate_up.bias [G], N.down.bias [H]       where the family has biases

Sources: truncated SVD with the singular values split evenly; the row-sparse remainder of LoSparse (arXiv 2306.11222)
as in MC-SMoE (arXiv 2310.01334).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation
from ..errors import OptionError
from ._stored import Spec, StoredBank, biases, each, finite, given_biases, matrices, own
from .dense import DenseBank

Ranks = int | None | Sequence[int | None]
"""A rank for all experts or one each; None leaves a matrix as it was."""


class Factors(NamedTuple):
    """A factorised matrix [R, K]: ``left`` [R, r], ``right`` [r, K], whole ``rows`` [n] and what they add [n, K]."""

    left: Tensor
    right: Tensor
    rows: Tensor | None = None
    sparse: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LowRankBank(StoredBank):
    """``rank`` and ``rows`` map a part to one number per expert. Built by :meth:`factorise` or :meth:`from_factors`."""

    FORMAT: ClassVar[str] = "low-rank"
    PARTS: ClassVar[tuple[str, ...]] = ("gate", "up", "down")
    EACH_PART: ClassVar[tuple[str, ...]] = ("rank", "rows")

    stored: Mapping[str, Tensor]
    rank: Mapping[str, tuple[int | None, ...]]
    rows: Mapping[str, tuple[int, ...]]
    shape: tuple[int, int]
    dtype: torch.dtype
    activation: Activation = SILU_MUL

    @classmethod
    def factorise(cls, dense: DenseBank, rank: Ranks | Mapping[str, Ranks], rows: int | Mapping[str, int] = 0) -> Self:
        """The best approximation of every matrix at its rank (Frobenius norm), stored in the bank's dtype.

        ``rank`` is one for all, one per expert, or a mapping from part to either. The ``rows`` rows of the remainder
        with the largest norm are kept as they are. Raises :class:`OptionError` on a rank or a number of rows that the
        matrix does not have, or weights that are NaN or infinite.
        """
        parts = cls._parts(dense.activation.gated)
        ranks = {p: each(_of(rank, p), dense.num_experts, "rank") for p in parts}
        counts = {p: _of(rows, p) for p in parts}
        experts = []
        for expert in range(dense.num_experts):
            found = matrices(dense.expert(expert), parts)
            made: dict[str, Factors | Tensor] = {}
            for part, weight in found.items():
                _check_rank(ranks[part][expert], counts[part], weight.shape, f"{expert}.{part}")
                made[part] = _factors(finite(weight, f"{expert}.{part}"), ranks[part][expert], counts[part])
            experts.append(made)
        bank = cls.from_factors(experts, dtype=dense.dtype, activation=dense.activation)
        return replace(bank, stored={**bank.stored, **biases(dense)})

    @classmethod
    def from_factors(
        cls,
        experts: Sequence[Mapping[str, Factors | Tensor]],
        *,
        dtype: torch.dtype,
        activation: Activation = SILU_MUL,
        biases: Sequence[Mapping[str, Tensor]] = (),
    ) -> Self:
        """A bank of given factors by part ("gate", "up", "down"); a plain tensor is a matrix left as it was.

        Factors are rounded to ``dtype``; ``biases`` gives "gate_up" and "down" of each expert, where there are any.
        Raises :class:`OptionError` on shapes that contradict, or a rank above full rank.
        """
        if not experts:
            raise OptionError("a bank needs at least one expert, got none")
        parts = cls._parts(activation.gated)
        stored = given_biases(biases)
        rank: dict[str, list[int | None]] = {p: [] for p in parts}
        rows: dict[str, list[int]] = {p: [] for p in parts}
        for expert, given in enumerate(experts):
            for part in parts:
                made = given[part]
                name = f"{expert}.{part}"
                stored |= {f"{name}.{leaf}": t for leaf, t in _leaves(made, dtype, name).items()}
                factored = isinstance(made, Factors)
                rank[part].append(made.left.shape[1] if factored else None)
                rows[part].append(len(made.rows) if factored and made.rows is not None else 0)
        down = experts[0]["down"]
        hidden, inner = (len(down.left), down.right.shape[1]) if isinstance(down, Factors) else down.shape
        ranks, counts = {p: tuple(v) for p, v in rank.items()}, {p: tuple(v) for p, v in rows.items()}
        return cls(stored, ranks, counts, (hidden, inner), dtype, activation).checked()

    def layout(self) -> Iterator[Spec]:
        for part in self.parts:
            rows, columns = self.size(part)
            for expert, (rank, kept) in enumerate(zip(self.rank[part], self.rows[part], strict=True)):
                name = f"{expert}.{part}"
                _check_rank(rank, kept, (rows, columns), name)
                if rank is None:
                    yield f"{name}.weight", (rows, columns), self.dtype
                    continue
                yield f"{name}.left", (rows, rank), self.dtype
                yield f"{name}.right", (rank, columns), self.dtype
                if kept:
                    yield f"{name}.rows", (kept,), torch.int32
                    yield f"{name}.sparse", (kept, columns), self.dtype

    def _decode(self, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        name = f"{expert}.{part}"
        if self.rank[part][expert] is None:
            return self.stored[f"{name}.weight"].to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        weight = self.stored[f"{name}.left"].to(wide) @ self.stored[f"{name}.right"].to(wide)
        if self.rows[part][expert]:
            weight.index_add_(0, self.stored[f"{name}.rows"].long(), self.stored[f"{name}.sparse"].to(wide))
        return weight.to(dtype)


def _of(value: Any, part: str) -> Any:
    return value[part] if isinstance(value, Mapping) else value


def _factors(weight: Tensor, rank: int | None, rows: int) -> Factors | Tensor:
    if rank is None:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    root = values[:rank].sqrt()
    left, right = (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)
    if not rows:
        return Factors(left, right)
    rest = wide - left.to(wide.dtype) @ right.to(wide.dtype)
    kept = rest.norm(dim=1).sort(descending=True, stable=True).indices[:rows].sort().values
    return Factors(left, right, kept, rest[kept])


def _leaves(made: Factors | Tensor, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    if not isinstance(made, Factors):
        return {"weight": own(made, dtype)}
    leaves = {"left": own(made.left, dtype), "right": own(made.right, dtype)}
    if made.rows is not None and made.sparse is not None and len(made.rows):
        order = made.rows.sort().indices
        if len(made.rows.unique()) < len(order) or made.rows.min() < 0 or made.rows.max() >= len(made.left):
            raise OptionError(f"rows of {name} must be different and from 0 to {len(made.left) - 1}")
        leaves |= {"rows": own(made.rows[order], torch.int32), "sparse": own(made.sparse[order], dtype)}
    return leaves


def _check_rank(rank: int | None, kept: int, size: Sequence[int], name: str) -> None:
    rows, columns = size
    if rank is not None and not 1 <= rank <= min(rows, columns):
        raise OptionError(f"rank={rank} is not possible for {name}: [{rows}, {columns}] has ranks 1 to {min(size)}")
    if not 0 <= kept <= rows:
        raise OptionError(f"rows={kept} is not possible for {name}: it has {rows} rows")
    if rank is None and kept:
        raise OptionError(f"{name} is left as it was (no rank): it has no remainder to keep {kept} rows of")
