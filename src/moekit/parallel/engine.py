"""One engine that carries out any dispatch plan, forward and backward.

Counts are gathered, every rank makes the plan, weights that must move start to, rows go to where they are computed,
outputs come home and are weighted there. The backward is the same journey the other way: gradients of outputs go out,
gradients of inputs come back, and gradients of weights that had moved return to their owners and are added. All of it
is one autograd node, so that every rank makes the same collective calls in the same order whatever it holds.
Shapes by suffix: T tokens, K slots, S pairs that hold an expert (sorted by it), E experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.contract import Routing, weighted_sum
from moekit.formats import DenseBank
from moekit.parallel._errors import ParallelError
from moekit.parallel._job import Dispatch, Job
from moekit.parallel._stage import Stage
from moekit.parallel._world import World
from moekit.parallel.dispatch import DispatchPlan, Layout, Planner, native
from moekit.parallel.exchange import Start, flat


@dataclass
class Engine:
    """Runs the experts of one layer over all ranks. Making one is a collective call, and so is every run of it.

    ``chunks`` cuts every piece of the plan: the rows of one chunk travel while another is computed. ``rematerialise``
    frees moved weights after the forward and fetches them again for the backward, which then computes hidden units
    anew. ``exchange`` is flat or two-level. ``last`` is the plan of the last run.

    Raises ParallelError where ranks disagree, or the layout is for another number of ranks.
    """

    world: World
    layout: Layout
    planner: Planner = native
    exchange: Start = flat
    chunks: int = 1
    rematerialise: bool = False
    last: DispatchPlan | None = None

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ParallelError(f"{self.chunks} chunks: a plan is carried out in at least one")
        if self.layout.world != self.world.size:
            raise ParallelError(
                f"this layout is for {self.layout.world} ranks, but {self.world.size} take part: make it for those"
            )
        self.world.agree(experts=self.layout.num_experts, layout=self.layout.fingerprint, chunks=self.chunks)

    @property
    def num_experts(self) -> int:
        return self.layout.num_experts

    def forward(self, shard: DenseBank, x_TH: Tensor, routing: Routing) -> Tensor:
        """[T, H]: the weighted sum, as the whole bank would give it; T may be 0. ``shard`` is this rank's share.

        Gradients reach x, the combine weights and the shards. The output, even without a row, must be part of the loss
        of every rank, or the backward of its peers waits in vain.
        """
        return weighted_sum(self.run(shard, x_TH, routing), routing)

    def run(self, shard: DenseBank, x_TH: Tensor, routing: Routing) -> Tensor:
        """Unweighted outputs [T, K, H] of every token's experts; zero where a slot is unused."""
        flat_index = routing.expert.reshape(-1)
        order = torch.sort(torch.where(flat_index < 0, self.num_experts, flat_index), stable=True).indices
        counts_E = routing.counts(self.num_experts)
        if len(counts_E) > self.num_experts:
            raise ParallelError(f"expert {len(counts_E) - 1} is routed to, but the layout has {self.num_experts}")
        counts = self.world.gather(counts_E).tolist()
        plan = self.last = self.planner(counts, self.layout).check(counts)
        rank, width = self.world.rank, routing.expert.shape[1]
        if shard.num_experts != len(self.layout.own(rank)):
            raise ParallelError(
                f"rank {rank} stores {len(self.layout.own(rank))} units of experts, but was given {shard.num_experts}"
            )
        stages = [Stage.of(plan, counts, rank, chunk, self.chunks) for chunk in range(self.chunks)]
        pair = order[: int(counts_E.sum())]
        job = Job(self.world, self.exchange, plan, stages, pair, width, shard, self.rematerialise)
        anchor = x_TH.new_zeros((), requires_grad=torch.is_grad_enabled())
        out = Dispatch.apply(job, x_TH, anchor, *shard.tensors().values())
        return out.view(*routing.expert.shape, x_TH.shape[1])
