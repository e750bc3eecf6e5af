"""An all-to-all that knows of tensor parallelism: who holds the same activations does not send them twice.

Under tensor parallelism of degree t, t ranks hold the same tokens between layers. Each of them serves only the experts
that lie on ranks of its own index, so that rows travel among p / t ranks and every row once; partial sums of the t
ranks are then added, after which all of them hold the same activations again.
Shapes by suffix: T tokens, K slots, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.contract import PAD, Routing
from moekit.formats import DenseBank
from moekit.parallel._errors import ParallelError
from moekit.parallel._groups import Groups
from moekit.parallel._world import World
from moekit.parallel.dispatch import Layout, Planner, native
from moekit.parallel.engine import Engine
from moekit.parallel.exchange import Start, flat


@dataclass
class Coordinated:
    """Runs the experts of one layer over all ranks; ``groups.inside`` are the ranks with the same activations.

    ``layout`` says which of all ranks stores which whole expert, as for :class:`Engine`. Every rank of a group must
    give the same tokens, routing and loss; gradients of x and of the weights are then whole on each of them. Making one
    is a collective call, and so is every run. Raises ParallelError for a layout of other ranks or of sliced experts.
    """

    groups: Groups
    layout: Layout
    planner: Planner = native
    exchange: Start = flat
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        inside, across = self.groups.inside, self.groups.across
        if self.layout.world != inside.size * across.size or self.layout.slices > 1:
            raise ParallelError(
                f"this layout has {self.layout.world} ranks and {self.layout.slices} slices of each expert: make it "
                f"for {inside.size * across.size} ranks and whole experts"
            )
        mine = [e for e, rank in enumerate(self.layout.owner) if rank % inside.size == inside.rank]
        if not mine:
            raise ParallelError(
                f"no expert lies on ranks of index {inside.rank}: {self.layout.num_experts} experts are too few"
            )
        place = torch.full((self.layout.num_experts + 1,), PAD)
        place[mine] = torch.arange(len(mine))
        self._place = place
        owner = tuple(self.layout.owner[e] // inside.size for e in mine)
        self.engine = Engine(across, Layout(across.size, owner), self.planner, self.exchange)

    def forward(self, shard: DenseBank, x_TH: Tensor, routing: Routing) -> Tensor:
        """[T, H]: the weighted sum, as the whole bank would give it. ``shard`` is this rank's share of ``layout``."""
        inside = self.groups.inside
        expert = self._place.to(routing.expert.device)[routing.expert]
        weight = _Alike.apply(routing.weight, inside).masked_fill(expert < 0, 0)
        part = self.engine.forward(shard, _Alike.apply(x_TH, inside), Routing(expert, weight))
        return _Summed.apply(part, inside)


def _sum(world: World, tensor: Tensor, what: str) -> Tensor:
    """Added in the order of ranks, so that all get the same bits."""
    return world.gather(tensor.contiguous().reshape(-1), what).sum(0).view_as(tensor)


class _Alike(torch.autograd.Function):
    """What all ranks of a group hold alike: each contributes a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(ctx.world, grad, "gradients inside"), None


class _Summed(torch.autograd.Function):
    """The sum of what the ranks of a group computed: the gradient of it is every part's, and all hold it already."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, world: World) -> Tensor:
        return _sum(world, part, "sums inside")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
