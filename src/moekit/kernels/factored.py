"""Products on factored experts: the factors are multiplied one after the other, and no weight matrix is ever made.

Shapes by suffix: T tokens, K slots, M rows of one expert, H hidden size, I intermediate size, G = 2I if gated else I,
L latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from ..formats import LatentBank, LowRankBank
from ._plan import Plan
from ._tiles import Tiles

Finish = Callable[[Tensor], Tensor]


class _Factored:
    """What both formats share: every product is a chain of :meth:`Tiles.linear`."""

    def __init__(self, bank: Any, finish: Finish | None = None) -> None:
        self.bank = bank
        self.finish = finish
        self.num_experts, self.activation = bank.num_experts, bank.activation
        self._tiles = Tiles(next(tensor for tensor in bank.stored.values() if tensor.dtype == bank.dtype))
        self._inputs = tuple(part for part in bank.parts if part != "down")

    def dtype(self, x_TH: Tensor) -> torch.dtype:
        return self._tiles.dtype

    def _biased(self, out: Tensor, expert: int, part: str) -> Tensor:
        bias = self.bank.stored.get(f"{expert}.{part}.bias")
        return out if bias is None else out.add_(bias)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._tiles.linear(x, self.bank.stored[name])


class LowRankProducts(_Factored):
    """Both products of every expert of a :class:`LowRankBank`: ``left @ (right @ x)``, and the kept rows on top."""

    bank: LowRankBank

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        parts = [self._product(x_MH, expert, part) for part in self._inputs]
        return self._biased(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], expert, "gate_up")

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._biased(self._product(h_MI, expert, "down"), expert, "down")

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        return self.down(expert, self.activation(self.up(expert, x_MH)))

    def _product(self, x_MK: Tensor, expert: int, part: str) -> Tensor:
        name = f"{expert}.{part}"
        if self.bank.rank[part][expert] is None:
            return self._linear(x_MK, f"{name}.weight")
        out = self._linear(self._linear(x_MK, f"{name}.right"), f"{name}.left")
        if self.bank.rows[part][expert]:
            out.index_add_(1, self.bank.stored[f"{name}.rows"], self._linear(x_MK, f"{name}.sparse"))
        return out


class LatentProducts(_Factored):
    """Both products of every expert of a :class:`LatentBank`.

    :meth:`forward` and :meth:`slots` take a whole batch and project each token once per group that it reaches; row by
    row, :meth:`rows` projects once per expert.
    """

    bank: LatentBank

    @property
    def fused(self) -> Self:
        """A whole batch goes through :meth:`forward` and :meth:`slots`, as through compiled products."""
        return self

    def up(self, expert: int, x_MH: Tensor) -> Tensor:
        return self._cores(expert, self._enter(self.bank.group[expert], x_MH))

    def down(self, expert: int, h_MI: Tensor) -> Tensor:
        return self._biased(self._leave(self.bank.group[expert], self._narrow(expert, h_MI)), expert, "down")

    def rows(self, expert: int, x_MH: Tensor) -> Tensor:
        return self.down(expert, self.activation(self.up(expert, x_MH)))

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, H] in the dtype of ``x_TH``: a shared down projection is applied to each group's weighted sum."""
        plan = Plan.of(index_TK, self.num_experts)
        x = x_TH.to(self.dtype(x_TH))
        weight, out = plan.weights(weight_TK, x.dtype), torch.zeros_like(x)
        together = self.bank.down_latent is not None and self.finish is None
        for group, token, segments in self._groups(plan):
            sums = x.new_zeros(len(token), self.bank.down_latent) if together else out
            for expert, start, stop, place, narrow in self._narrowed(x, group, token, segments):
                share, where = weight[start:stop], plan.token[start:stop]
                if together:
                    sums.index_add_(0, place, narrow * share)
                    self._add_bias(out, expert, where, share)
                else:
                    out.index_add_(0, where, self._finished(expert, narrow) * share)
            if together:
                out.index_add_(0, token, self._leave(group, sums))
        return out.to(x_TH.dtype)

    def slots(self, x_TH: Tensor, index_TK: Tensor) -> Tensor:
        """Unweighted outputs [T, K, H] in the dtype of ``x_TH``; zero where a slot holds no expert."""
        plan = Plan.of(index_TK, self.num_experts)
        x = x_TH.to(self.dtype(x_TH))
        rows = x.new_empty(plan.pair.numel(), x.shape[1])
        for group, token, segments in self._groups(plan):
            for expert, start, stop, _, narrow in self._narrowed(x, group, token, segments):
                rows[start:stop] = self._finished(expert, narrow)
        return plan.scatter(rows.to(x_TH.dtype), *index_TK.shape)

    def _groups(self, plan: Plan) -> Iterator[tuple[int, Tensor, list[tuple[int, int, int, Tensor]]]]:
        """Every group that tokens reach: its tokens, and (expert, first pair, end, places among them) of its experts.

        In order of the groups' first experts, so that sums are in a fixed order.
        """
        found: dict[int, list[tuple[int, int, int]]] = {}
        for segment in plan.segments:
            found.setdefault(self.bank.group[segment[0]], []).append(segment)
        for group, segments in found.items():
            counts = [stop - start for _, start, stop in segments]
            tokens = torch.cat([plan.token[start:stop] for _, start, stop in segments])
            unique, place = tokens.unique(return_inverse=True)
            yield group, unique, [(*s, at) for s, at in zip(segments, place.split(counts), strict=True)]

    def _narrowed(
        self, x_TH: Tensor, group: int, token: Tensor, segments: list[tuple[int, int, int, Tensor]]
    ) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
        """Every expert of a group and what it gives before the shared down projection."""
        entered = self._enter(group, x_TH[token])
        for expert, start, stop, place in segments:
            rows = entered if len(segments) == 1 else [z.index_select(0, place) for z in entered]
            yield expert, start, stop, place, self._narrow(expert, self.activation(self._cores(expert, rows)))

    def _enter(self, group: int, x_MH: Tensor) -> list[Tensor]:
        """What the cores of gate and up take: latent coordinates [M, L], or x itself where a part is plain."""
        return [
            x_MH
            if self.bank.latent(part) is None
            else self._tiles.linear(x_MH, self.bank.stored[f"shared.{part}.basis"][group])
            for part in self._inputs
        ]

    def _cores(self, expert: int, entered: list[Tensor]) -> Tensor:
        parts = [self._core(z, expert, part) for part, z in zip(self._inputs, entered, strict=True)]
        return self._biased(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], expert, "gate_up")

    def _core(self, z: Tensor, expert: int, part: str) -> Tensor:
        leaf = "weight" if self.bank.latent(part) is None else "core"
        return self._linear(z, f"{expert}.{part}.{leaf}")

    def _narrow(self, expert: int, h_MI: Tensor) -> Tensor:
        """[M, L], or [M, H] where down is plain."""
        return self._core(h_MI, expert, "down")

    def _leave(self, group: int, narrow: Tensor) -> Tensor:
        if self.bank.down_latent is None:
            return narrow
        return self._tiles.linear(narrow, self.bank.stored["shared.down.basis"][group])

    def _finished(self, expert: int, narrow: Tensor) -> Tensor:
        rows = self._biased(self._leave(self.bank.group[expert], narrow), expert, "down")
        return self.finish(rows) if self.finish else rows

    def _add_bias(self, out_TH: Tensor, expert: int, token: Tensor, share: Tensor) -> None:
        bias = self.bank.stored.get(f"{expert}.down.bias")
        if bias is not None:
            out_TH.index_add_(0, token, share * bias)
