"""Rows between ranks: an all-to-all with uneven splits, flat or over a grid of nodes, forward and backward.

Every call is described by the whole table ``rows`` [W][W]: how many rows each rank sends to each other. All ranks hold
the same table (it follows from gathered counts and a plan), so no call has to ask for sizes, and the way back is the
transposed table. Rows lie in the order of their target rank when sent and of their source rank when received.
Shapes by suffix: W ranks, S rows sent, R rows received, H columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.parallel._errors import ParallelError
from moekit.parallel._world import Pending, World

Table = Sequence[Sequence[int]]
Start = Callable[[World, Tensor, Table, str], Pending]
"""How an exchange is begun: (world, x_SH, rows, what) -> Pending of [R, H]. ``what`` names it in the traffic."""


def transposed(rows: Table) -> list[list[int]]:
    """The table of the way back."""
    return [list(column) for column in zip(*rows, strict=True)]


def flat(world: World, x_SH: Tensor, rows: Table, what: str = "tokens") -> Pending:
    """Every rank sends to every rank: W - 1 messages a rank. Raises ParallelError for a table that does not fit."""
    _check(world, x_SH, rows)
    ranks = range(world.size)
    return _exchange(world, world.tokens, x_SH, ranks, rows[world.rank], [row[world.rank] for row in rows], what)


def two_level(world: World, x_SH: Tensor, rows: Table, what: str = "tokens") -> Pending:
    """Within the node first, to the local rank of the target; then between nodes, among equal local ranks.

    With n nodes of m ranks, a rank sends n - 1 messages between nodes instead of m (n - 1), each m times as long; what
    crosses between nodes is the same, what is sent within the node is added. Same rows in the same order as
    :func:`flat`. (Tutel's 2DH and DeepSpeed-MoE's hierarchical all-to-all.)
    """
    _check(world, x_SH, rows)
    grid = world.grid
    if grid.nodes == 1:
        return flat(world, x_SH, rows, what)
    node, local = grid.node(world.rank), grid.local(world.rank)
    mates = [node * grid.per_node + m for m in range(grid.per_node)]
    column = [n * grid.per_node + local for n in range(grid.nodes)]
    by_target = x_SH.split(list(rows[world.rank]))
    x = torch.cat([by_target[n * grid.per_node + m] for m in range(grid.per_node) for n in range(grid.nodes)])

    def across(source: int, m: int) -> int:
        """Rows of a rank for the ranks with local rank m, on all nodes."""
        return sum(rows[source][n * grid.per_node + m] for n in range(grid.nodes))

    sent = [across(world.rank, m) for m in range(grid.per_node)]
    first = _exchange(world, world.node_group, x, mates, sent, [across(mate, local) for mate in mates], what)

    def finish() -> Tensor:
        by_mate = first.wait().split([rows[mate][target] for mate in mates for target in column])
        y = torch.cat([by_mate[m * grid.nodes + n] for n in range(grid.nodes) for m in range(grid.per_node)])
        sent = [sum(rows[mate][target] for mate in mates) for target in column]
        back = [sum(rows[n * grid.per_node + m][world.rank] for m in range(grid.per_node)) for n in range(grid.nodes)]
        return _exchange(world, world.column_group, y, column, sent, back, what).wait()

    return Pending(finish)


def all_to_all(world: World, x_SH: Tensor, rows: Table, what: str = "tokens", start: Start = flat) -> Tensor:
    """[R, H] with gradients. Every rank enters the backward, even without rows, if its output is part of its loss."""
    anchor = x_SH.new_zeros((), requires_grad=torch.is_grad_enabled())
    return _AllToAll.apply(x_SH, anchor, world, rows, what, start)


class _AllToAll(torch.autograd.Function):
    """``anchor`` puts the node into the graph of a rank whose rows need no gradient: its peers wait for it."""

    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, anchor: Tensor, world: World, rows: Table, what: str, start: Start) -> Tensor:
        ctx.world, ctx.rows, ctx.what, ctx.start = world, rows, what, start
        return start(world, x_SH, rows, what).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.start(ctx.world, grads[0], transposed(ctx.rows), f"{ctx.what}-gradients").wait()
        return dx, None, None, None, None, None


def _check(world: World, x_SH: Tensor, rows: Table) -> None:
    if len(rows) != world.size or any(len(row) != world.size for row in rows):
        raise ParallelError(f"the table of an exchange is for {len(rows)} ranks, but {world.size} take part")
    if sum(rows[world.rank]) != len(x_SH):
        raise ParallelError(f"rank {world.rank} holds {len(x_SH)} rows, but the table sends {sum(rows[world.rank])}")


def _exchange(
    world: World, group: Any, x_SH: Tensor, ranks: Sequence[int], send: Sequence[int], receive: Sequence[int], what: str
) -> Pending:
    """One all-to-all in a group whose members are ``ranks``; travels as bytes, so any dtype does."""
    width = x_SH[0].numel() * x_SH.element_size() if len(x_SH) else 0
    for target, count in zip(ranks, send, strict=True):
        world.traffic.add(what, world.grid.level(world.rank, target), count, count * width)
    x = x_SH.contiguous()
    out = x.new_empty(sum(receive), *x.shape[1:])
    if len(ranks) == 1:
        return Pending(lambda: out.copy_(x))
    doing, into, sent = f"exchanging {what}", bytes_of(out), bytes_of(x)
    with world.waiting(doing):
        work = dist.all_to_all_single(into, sent, list(receive), list(send), group=group, async_op=True)

    def finish() -> Tensor:
        with world.waiting(doing):
            work.wait()
        return out

    return Pending(finish)


def bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as [rows, bytes] uint8, of a contiguous tensor."""
    rows = len(tensor)
    width = tensor.numel() // rows if rows else 1
    # not a view by shape: a single element may have any stride and still be contiguous
    return tensor.as_strided((rows, width), (width, 1)).view(torch.uint8)
