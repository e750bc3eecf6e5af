"""Expert parallelism times data parallelism: experts are spread inside groups of ranks, and every group has them all.

Gradients of an expert are summed over the ranks that store the same one (``across``), those of everything else over all
ranks. Sums, never means: whoever scales a loss by the tokens of all ranks trains on the mean over those tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.parallel._errors import ParallelError
from moekit.parallel._links import Grid
from moekit.parallel._world import World


@dataclass(frozen=True)
class Groups:
    """``inside``: the ranks that share the experts; ``across``: those that store what this rank does."""

    inside: World
    across: World

    @classmethod
    def of(cls, world: World, size: int) -> Groups:
        """Neighbouring ranks in groups of ``size``, on as few nodes as can be. A collective call.

        Raises ParallelError where the ranks do not divide, groups would cut nodes unevenly, or ranks disagree.
        """
        world.agree(groups=size)
        grid, ranks = world.grid, range(world.size)
        if size < 1 or world.size % size:
            raise ParallelError(f"{world.size} ranks do not divide into groups of {size}: choose a divisor")
        if size % grid.per_node and grid.per_node % size:
            raise ParallelError(
                f"groups of {size} ranks cut nodes of {grid.per_node} unevenly: choose a divisor or a multiple"
            )
        spanned = max(1, size // grid.per_node)
        alike = Grid(grid.nodes, grid.per_node // size) if size < grid.per_node else Grid(world.size // size, 1)
        inside = world.part([ranks[first : first + size] for first in ranks[::size]], Grid.of(size, spanned))
        return cls(inside, world.part([ranks[place::size] for place in range(size)], alike))


def degree_for(num_experts: int, world: World, most: int | None = None) -> int:
    """Over how many ranks to spread a layer: at most ``most``, each with an expert, in groups that nodes allow.

    Raises ParallelError for a ``most`` below 1.
    """
    if most is not None and most < 1:
        raise ParallelError(f"degree={most}: spread every layer over 1 rank or more")
    limit, per_node = min(num_experts, most or world.size), world.grid.per_node
    return max(
        size
        for size in range(1, world.size + 1)
        if size <= limit and world.size % size == 0 and (size % per_node == 0 or per_node % size == 0)
    )


@torch.no_grad()
def sum_gradients(world: World, parameters: Iterable[Tensor]) -> None:
    """Sum over all ranks of a world, in one message; a parameter without a gradient here takes part with zeros."""
    parts = [p for p in parameters if p.requires_grad]
    if not parts or world.size == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parts])
    with world.waiting("summing gradients"):
        dist.all_reduce(flat, group=world.tokens)
    for parameter, grad in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        parameter.grad = grad.view_as(parameter)
