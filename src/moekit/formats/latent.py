"""Latent experts: groups of experts share a projection to a narrow space, and keep a small matrix each.

Tensors (n groups; l the latent size of a part; a part without one is stored plain):

    shared.gate.basis, shared.up.basis [n, l, H]   N.gate.core, N.up.core [I, l]   gate of expert N is core @ basis
    shared.down.basis [n, H, l]                    N.down.core [l, I]              down of expert N is basis @ core
    N.part.weight [R, K]                           instead of the core where a part has no latent size
    N.gate_up.bias [G], N.down.bias [H]            where the family has biases

Gate and up have bases of their own. Source: Mixture of Latent Experts (arXiv 2503.23100): version 1 leaves down as it
was, version 2 shares it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation
from ..errors import OptionError
from ._stored import Spec, StoredBank, biases, each, finite, given_biases, matrices, own
from .dense import DenseBank


@dataclass(frozen=True, eq=False)
class LatentBank(StoredBank):
    """``group`` holds the group of every expert, the latent sizes are of the whole bank (None: the part is plain).

    Built by :meth:`factorise` or :meth:`from_factors`.
    """

    FORMAT: ClassVar[str] = "latent"
    PARTS: ClassVar[tuple[str, ...]] = ("gate", "up", "down")
    EACH: ClassVar[tuple[str, ...]] = ("group",)
    WHOLE: ClassVar[tuple[str, ...]] = ("gate_latent", "up_latent", "down_latent")

    stored: Mapping[str, Tensor]
    group: tuple[int, ...]
    gate_latent: int | None
    up_latent: int | None
    down_latent: int | None
    shape: tuple[int, int]
    dtype: torch.dtype
    activation: Activation = SILU_MUL

    @classmethod
    def factorise(
        cls, dense: DenseBank, group: int | Sequence[int], latent: int, *, share_down: int | None = None
    ) -> Self:
        """The best shared bases in the Frobenius norm, by SVD of the stacked matrices of each group.

        ``group`` is the group of every expert, or a number of neighbours per group; ``latent`` the size of gate and
        up, ``share_down`` that of down. Exact where the rows (of down: the columns) of a group's matrices lie in one
        space of that dimension; else the squared error is the sum of the discarded squared singular values.
        Raises :class:`OptionError` on sizes that cannot be, or weights that are NaN or infinite.
        """
        if isinstance(group, int):
            _positive("group", group)
            group = [expert // group for expert in range(dense.num_experts)]
        groups = each(group, dense.num_experts, "group")
        parts = cls._parts(dense.activation.gated)
        split = [matrices(dense.expert(e), parts) for e in range(dense.num_experts)]
        bases: dict[str, Tensor] = {}
        cores: list[dict[str, Tensor]] = [{} for _ in split]
        for part in parts:
            size = share_down if part == "down" else latent
            weights = [finite(found[part], f"{e}.{part}") for e, found in enumerate(split)]
            if size is None:
                made = weights
            else:
                _check_latent(size, part, dense.hidden_size)
                bases[part], made = _shared(weights, groups, size, part == "down")
            for expert, core in zip(cores, made, strict=True):
                expert[part] = core
        bank = cls.from_factors(bases, cores, groups, dtype=dense.dtype, activation=dense.activation)
        return replace(bank, stored={**bank.stored, **biases(dense)})

    @classmethod
    def from_factors(
        cls,
        bases: Mapping[str, Tensor],
        cores: Sequence[Mapping[str, Tensor]],
        group: Sequence[int],
        *,
        dtype: torch.dtype,
        activation: Activation = SILU_MUL,
        biases: Sequence[Mapping[str, Tensor]] = (),
    ) -> Self:
        """A bank of given factors, rounded to ``dtype``; ``cores`` holds the whole matrix of a part without a basis.

        Raises :class:`OptionError` on shapes that contradict, or groups that are not 0 to n - 1.
        """
        if not cores:
            raise OptionError("a bank needs at least one expert, got none")
        stored = given_biases(biases)
        stored |= {f"shared.{part}.basis": own(basis, dtype) for part, basis in bases.items()}
        latent = {part: basis.shape[2 if part == "down" else 1] for part, basis in bases.items()}
        for expert, given in enumerate(cores):
            for part in cls._parts(activation.gated):
                leaf = "core" if part in bases else "weight"
                stored[f"{expert}.{part}.{leaf}"] = own(given[part], dtype)
        down = cores[0]["down"]
        hidden, inner = bases["down"].shape[1] if "down" in bases else len(down), down.shape[1]
        gate, up, shared_down = (latent.get(part) for part in cls.PARTS)
        return cls(stored, tuple(group), gate, up, shared_down, (hidden, inner), dtype, activation).checked()

    def latent(self, part: str) -> int | None:
        """Latent size of a part, None where it is plain."""
        size: int | None = getattr(self, f"{part}_latent")
        return size

    def layout(self) -> Iterator[Spec]:
        if sorted(set(self.group)) != list(range(len(set(self.group)))):
            raise OptionError(f"groups must be numbered 0 to n - 1 with none empty, got {sorted(set(self.group))}")
        for part in self.parts:
            (rows, columns), size = self.size(part), self.latent(part)
            if size is None:
                core: tuple[str, tuple[int, int]] = ("weight", (rows, columns))
            else:
                _check_latent(size, part, self.hidden_size)
                basis = (rows, size) if part == "down" else (size, columns)
                core = ("core", (size, columns) if part == "down" else (rows, size))
                yield f"shared.{part}.basis", (len(set(self.group)), *basis), self.dtype
            for expert in range(self.num_experts):
                yield f"{expert}.{part}.{core[0]}", core[1], self.dtype

    def select(self, experts: Sequence[int]) -> Self:
        """As of every bank; only the groups of the named experts are kept, numbered as they appear."""
        bank = super().select(experts)
        kept = list(dict.fromkeys(bank.group))
        stored = {name: t[kept] if name.startswith("shared.") else t for name, t in bank.stored.items()}
        return replace(bank, stored=stored, group=tuple(kept.index(g) for g in bank.group))

    def _decode(self, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        if self.latent(part) is None:
            return self.stored[f"{expert}.{part}.weight"].to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        basis = self.stored[f"shared.{part}.basis"][self.group[expert]].to(wide)
        core = self.stored[f"{expert}.{part}.core"].to(wide)
        return (basis @ core if part == "down" else core @ basis).to(dtype)


def _shared(weights: Sequence[Tensor], groups: Sequence[int], size: int, turned: bool) -> tuple[Tensor, list[Tensor]]:
    """Bases [n, size, K] with orthonormal rows and cores [R, size] (both transposed where ``turned``)."""
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    laid = [(w.t() if turned else w).to(wide) for w in weights]
    bases = []
    for group in range(max(groups) + 1):
        stacked = [w for w, g in zip(laid, groups, strict=True) if g == group]
        if not stacked:
            raise OptionError(f"groups must be numbered 0 to n - 1 with none empty, got {sorted(set(groups))}")
        found = torch.linalg.svd(torch.cat(stacked), full_matrices=False).Vh
        _check_latent(size, f"group {group}", len(found))
        bases.append(found[:size])
    cores = [w @ bases[g].t() for w, g in zip(laid, groups, strict=True)]
    if turned:
        return torch.stack([b.t() for b in bases]), [c.t() for c in cores]
    return torch.stack(bases), cores


def _check_latent(size: int, part: str, full: int) -> None:
    _positive("latent", size)
    if size > full:
        raise OptionError(f"latent={size} of {part} is above full rank, which is {full}")


def _positive(what: str, value: Any) -> None:
    if value < 1:
        raise OptionError(f"{what}={value} is not possible: it must be at least 1")
