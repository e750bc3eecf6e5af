"""One run of the engine on one rank, forward and backward: what travels, what is computed, what is kept between.

Shapes by suffix: T tokens, K slots, S pairs that hold an expert (sorted by it), R rows received, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.formats import DenseBank
from moekit.parallel._chunks import Arriving, start_gather, start_reduce
from moekit.parallel._compute import Local
from moekit.parallel._stage import Stage
from moekit.parallel._world import Pending, World
from moekit.parallel.dispatch import DispatchPlan
from moekit.parallel.exchange import Start, transposed


class Weights:
    """This rank's shard and what comes to it, as leaves of the graph of the local computation."""

    def __init__(self, bank: DenseBank, own: Sequence[Tensor], arriving: Arriving, grad: bool) -> None:
        self.own = [t.detach().requires_grad_(grad and t.requires_grad) for t in own]
        self.bank = replace(bank, **dict(zip(bank.tensors(), self.own, strict=True)))
        self._arriving: Arriving | None = arriving
        self._came: list[Tensor] = []

    def came(self) -> list[Tensor]:
        """What other ranks sent, waited for at the first call."""
        if self._arriving is not None:
            arrived, self._arriving = self._arriving.wait(), None
            self._came = [t.requires_grad_(o.requires_grad) for t, o in zip(arrived, self.own, strict=True)]
        return self._came


@dataclass
class Job:
    """``pair`` [S] is where each sorted row lies in the flat routing [T * K]; ``places`` is unit -> row of the shard.

    ``kept`` has (rows, outputs) of every stage; with ``rematerialise`` only rows are kept, and no weights.
    """

    world: World
    exchange: Start
    plan: DispatchPlan
    stages: list[Stage]
    pair: Tensor
    slots: int
    shard: DenseBank
    rematerialise: bool

    def __post_init__(self) -> None:
        rank, device = self.world.rank, self.pair.device
        self.local = Local.of(self.plan, rank)
        self.places = {unit: place for place, unit in enumerate(self.plan.layout.own(rank))}
        self.stages = [replace(stage, sent=stage.sent.to(device)) for stage in self.stages]
        self.weights: Weights | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_TH: Tensor, own: Sequence[Tensor], keep: bool) -> Tensor:
        """[T * K, H], zero where a slot is unused."""
        graph = keep and not self.rematerialise
        weights = self._fetch(own, "weights", graph)
        sent = [x_TH.detach().index_select(0, self._token(stage)) for stage in self.stages]
        returning = []
        for stage, rows in self._arrivals(sent, "tokens"):
            with torch.set_grad_enabled(graph):
                y = self.local.rows(weights.bank, weights.came, rows.requires_grad_(graph), stage)
            if keep:
                self.kept.append((rows, y))
            returning.append(self._start(y.detach(), transposed(stage.rows), "outputs"))
        out = x_TH.new_zeros(len(x_TH) * self.slots, x_TH.shape[1])
        for stage, pending in zip(self.stages, returning, strict=True):
            out.index_add_(0, self.pair[stage.sent], pending.wait())
        weights.came()
        self.weights = weights if graph else None
        return out

    def backward(self, dout: Tensor, own: Sequence[Tensor], tokens: int) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of x [T, H] and of the shard, from that of the flat slots [T * K, H]."""
        weights = self.weights or self._fetch(own, "weights", True)
        sent = [dout.index_select(0, self.pair[stage.sent]) for stage in self.stages]
        returning, sums = [], _Sums(weights)
        for (stage, dy), (rows, y) in zip(self._arrivals(sent, "output-gradients"), self.kept, strict=True):
            if self.rematerialise:
                with torch.enable_grad():
                    y = self.local.rows(weights.bank, weights.came, rows.requires_grad_(), stage)
            returning.append(self._start(sums.through(rows, y, dy), transposed(stage.rows), "input-gradients"))
        self.kept, self.weights = [], None
        mine, foreign = sums.finished()
        came, into = ([t for t in tensors if t is not None] for tensors in (foreign, mine))
        home = start_reduce(self.world, came, into, self.places, self.plan.moves)
        dx_TH = dout.new_zeros(tokens, dout.shape[1])
        for stage, pending in zip(self.stages, returning, strict=True):
            dx_TH.index_add_(0, self._token(stage), pending.wait())
        home.wait()
        return dx_TH, mine

    def _token(self, stage: Stage) -> Tensor:
        return self.pair[stage.sent] // self.slots

    def _fetch(self, own: Sequence[Tensor], what: str, grad: bool) -> Weights:
        arriving = start_gather(self.world, own, self.places, self.plan.moves, what)
        return Weights(self.shard, own, arriving, grad)

    def _start(self, x: Tensor, rows: list[list[int]], what: str) -> Pending:
        return self.exchange(self.world, x, rows, what)

    def _arrivals(self, sent: Sequence[Tensor], what: str) -> Iterator[tuple[Stage, Tensor]]:
        """Each stage with the rows that reach this rank; those of the next are under way meanwhile."""
        pending = self._start(sent[0], self.stages[0].rows, what)
        for place, stage in enumerate(self.stages):
            rows = pending.wait()
            if place + 1 < len(sent):
                pending = self._start(sent[place + 1], self.stages[place + 1].rows, what)
            yield stage, rows


class _Sums:
    """Gradients of the shard and of what came, summed over stages; None where a tensor is not trained."""

    def __init__(self, weights: Weights) -> None:
        self.leaves = [*weights.own, *weights.came()]
        self.sums: list[Tensor | None] = [None for _ in self.leaves]
        self.tensors = len(weights.own)

    def through(self, rows: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """Adds the gradients of one stage and returns that of its rows [R, H]."""
        trained = [place for place, leaf in enumerate(self.leaves) if leaf.requires_grad]
        drows, *grads = torch.autograd.grad(y, [rows, *(self.leaves[p] for p in trained)], dy, allow_unused=True)
        for place, grad in zip(trained, grads, strict=True):
            if grad is not None:
                total = self.sums[place]
                self.sums[place] = grad if total is None else total.add_(grad)
        return drows

    def finished(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """(of the shard, of what came): zeros where nothing was computed with what is trained."""
        total = [
            torch.zeros_like(leaf) if leaf.requires_grad and grad is None else grad
            for leaf, grad in zip(self.leaves, self.sums, strict=True)
        ]
        return total[: self.tensors], total[self.tensors :]


class Dispatch(torch.autograd.Function):
    """``anchor`` puts the node into the graph of every rank, whatever needs gradients there: its peers wait for it."""

    @staticmethod
    def forward(ctx: Any, job: Job, x_TH: Tensor, anchor: Tensor, *own: Tensor) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(x_TH, *own)
        return job.forward(x_TH, own, anchor.requires_grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, *own = ctx.saved_tensors
        dx_TH, down = ctx.job.backward(grads[0], own, len(x_TH))
        return None, dx_TH if ctx.needs_input_grad[1] else None, None, *down
