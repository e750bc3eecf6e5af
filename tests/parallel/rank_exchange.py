"""What the ranks do for test_exchange."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moekit.lab.experiments._spread import bank, world
from moekit.parallel import (
    DispatchPlan,
    Engine,
    Layout,
    Move,
    ParallelError,
    World,
    all_to_all,
    flat,
    gather_chunks,
    native,
    shard,
    two_level,
    unshard,
)
from moekit.parallel._chunks import incoming


def travels(rows: list[list[int]], nodes: int, dtype: str) -> dict[str, Any]:
    """Rows coded (source, target, number) through flat and two-level, and what was counted."""
    here = world(nodes)
    coded = [[here.rank, target, i] for target, count in enumerate(rows[here.rank]) for i in range(count)]
    x = torch.tensor(coded, dtype=getattr(torch, dtype)).view(-1, 3)
    wanted = [[source, here.rank, i] for source in range(here.size) for i in range(rows[source][here.rank])]
    found = {}
    for start in (flat, two_level):
        here.traffic.clear()
        out = start(here, x, rows, "tokens").wait()
        found[start.__name__] = {"right": out.to(torch.int64).tolist() == wanted, "traffic": here.traffic.as_dict()}
    return found


def gradient(rows: list[list[int]], idle: bool) -> bool:
    """d/dx of sum of (weight by arrival) * received equals the weights carried back; one rank's x may need none."""
    here = world()
    wants = not (idle and here.rank == 1)
    x = torch.zeros(sum(rows[here.rank]), 2, dtype=torch.float64, requires_grad=wants)
    out = all_to_all(here, x, rows)
    marks = torch.tensor([[s, here.rank] for s in range(here.size) for _ in range(rows[s][here.rank])])
    (out * marks.view(-1, 2)).sum().backward()
    wanted = torch.tensor([[here.rank, t] for t, count in enumerate(rows[here.rank]) for _ in range(count)])
    return not wants or torch.equal(x.grad, wanted.view(-1, 2).to(torch.float64))


def chunks(owner: list[int], moves: list[tuple[int, int]]) -> dict[str, Any]:
    """Sparse all-gather and reduce-scatter of chunks whose content names them, against their post-conditions."""
    here = world()
    own = [c for c, rank in enumerate(owner) if rank == here.rank]
    made = tuple(Move(owner[c], rank, c) for c, rank in moves)
    tensors = [
        torch.tensor([[c, 0.5] for c in own], dtype=torch.float64).view(-1, 2).requires_grad_(),
        torch.tensor([float(c) for c in own], dtype=torch.float64).requires_grad_(),
    ]
    here.traffic.clear()
    came = gather_chunks(here, tensors, {c: i for i, c in enumerate(own)}, made)
    held = incoming(made, here.rank)
    right = came[0].tolist() == [[c, 0.5] for c in held] and came[1].tolist() == [float(c) for c in held]
    sum((10.0**here.rank) * t.sum() for t in came).backward()
    wanted = [sum(10.0**rank for c, rank in moves if c == mine) for mine in own]
    summed = tensors[0].grad.tolist() == [[w, w] for w in wanted] and tensors[1].grad.tolist() == wanted
    return {"gathered": right, "reduced": summed, "traffic": here.traffic.as_dict()}


def whole_again(slices: int) -> bool:
    here, whole = world(), bank(3)
    layout = Layout(here.size, tuple(u * 7 % here.size for u in range(3 * slices)), slices)
    back = unshard(here, layout, shard(whole, layout, here.rank))
    return all(torch.equal(t, whole.tensors()[n]) for n, t in back.tensors().items())


def refused(case: str) -> str:
    """The message of a mistake that every rank must be told about."""
    here = world()
    try:
        if case == "layout":
            Engine(here, Layout.contiguous(4 if here.rank else 5, here.size))
        elif case == "world":
            Engine(here, Layout.contiguous(4, here.size + 1))
        elif case == "chunks":
            Engine(here, Layout.contiguous(4, here.size), chunks=0)
        elif case == "table":
            flat(here, torch.zeros(1, 2), [[1]])
        elif case == "rows":
            flat(here, torch.zeros(3, 2), [[0] * here.size for _ in range(here.size)])
        elif case == "nodes":
            World.join(nodes=3)
        else:
            _run(here, case)
    except ParallelError as error:
        return str(error)
    return "nothing was raised"


def _run(here: World, case: str) -> None:
    from moekit.contract import Routing

    layout = Layout.contiguous(4, here.size)
    other = Layout.contiguous(4, here.size + 1)
    planner = (lambda counts, _: DispatchPlan(other, ())) if case == "plan" else native
    experts = shard(bank(4), layout, here.rank)
    index = torch.full((1, 1), 4 if case == "expert" else 0)
    own = experts.select([0]) if case == "shard" else experts
    Engine(here, layout, planner).run(own, torch.zeros(1, 6, dtype=torch.float64), Routing(index, index.double()))


def dies(patience: float) -> str:
    """Rank 1 dies soon; rank 0 waits for it in an exchange and returns what it was told."""
    here = World.join(patience=patience)
    if here.rank == 1:
        threading.Timer(0.5, os._exit, [0]).start()
        return ""
    try:
        flat(here, torch.zeros(4, 2), [[2, 2], [2, 2]]).wait()
    except ParallelError as error:
        return str(error)
    return "nothing was raised"


def silent(patience: float) -> str:
    """Rank 0 waits in an exchange to which rank 1 never comes."""
    here = World.join(patience=60)
    here.tokens = dist.new_group(timeout=timedelta(seconds=patience))
    here.patience = patience
    try:
        if here.rank == 0:
            flat(here, torch.zeros(4, 2), [[2, 2], [2, 2]]).wait()
    except ParallelError as error:
        return str(error)
    return "nothing was raised"


def no_group() -> str:
    try:
        World.join()
    except ParallelError as error:
        return str(error)
    return "nothing was raised"
