"""What the ranks do for test_group_balance: their own part of a batch, against one process with all of it."""

from __future__ import annotations

import torch
from rank_attach import ids
from rank_groups import model

from moekit.contract import PAD
from moekit.lab.experiments._spread import world
from moekit.parallel import Groups
from moekit.parallel._group_balance import GroupBalance, group_term
from moekit.train.balance import Balance, term


def part(rank: int, experts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and choices of a rank's tokens; rank 1 has none, and one slot of rank 0 is unused."""
    draw = torch.Generator().manual_seed(rank)
    scores = torch.rand(0 if rank == 1 else 3 + rank, experts, generator=draw, dtype=torch.float64)
    expert = scores.topk(2).indices
    if rank == 0:
        expert[0, 1] = PAD
    return scores, expert


def equals(size: int) -> dict[str, float]:
    """The term of this rank's group and its gradient, against one process with the tokens of the group."""
    inside = Groups.of(world(), size).inside
    parts = [part(rank) for rank in inside.members]
    scores, expert = part(world().rank)
    scores.requires_grad_()
    value = group_term(scores, expert, inside)
    value.backward()
    whole = [s.requires_grad_() for s, _ in parts]
    tokens = torch.cat(whole)
    wanted = term(tokens, torch.cat([e for _, e in parts])) if len(tokens) else tokens.sum()
    grads = torch.autograd.grad(wanted, whole, materialize_grads=True)
    gap = (scores.grad - grads[inside.rank]).abs()
    return {"value": abs(float(value - wanted)), "gradient": float(gap.max()) if gap.numel() else 0.0}


def model_equals() -> dict[str, float]:
    """Router gradients of a stock model, summed over ranks, against one process with every rank's rows."""
    here, net, alone = world(), model(4), model(4)
    rows = [ids(0)[:, :5] + rank for rank in range(here.size)]
    with GroupBalance(net, here) as balance:
        net(rows[here.rank], use_cache=False)
        ours = balance.take()
        ours.backward()
    with Balance(alone) as balance:
        alone(torch.cat(rows), use_cache=False)
        theirs = balance.take()
        theirs.backward()
    gap = 0.0
    for mine, other in zip(net.parameters(), alone.parameters(), strict=True):
        if other.grad is not None:
            summed = here.gather((torch.zeros_like(mine) if mine.grad is None else mine.grad).reshape(-1)).sum(0)
            gap = max(gap, float((summed.view_as(mine) - other.grad).abs().max()))
    return {"value": abs(float(ours - theirs)), "gradient": gap}
