"""Hecate: every expert is stored once, and the ones expected to be hot are lent to other ranks for one iteration.

Paper: Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data Parallelism, 2025 (n 69).
Method: predicted load F = mean of the last w = 5 iterations. Before the routing is known, a sparse all-gather lends the
    top-t experts: with t <= m (extra experts a rank has room for) to all ranks, else W * m slots are dealt to them in
    proportion to F, on ranks and nodes with most room, nodes without the expert first. Tokens go to a replica on their
    own rank, else evenly to those of their node, else evenly to all others. Gradients of replicas are summed onto the
    owner, who alone has optimiser state. Calibration lends more by the true loads, where what it saves outweighs
    transfers that nothing hides. Sharding is redone now and then over all layers, with equal slots in sum.
Uses: parallel.dispatch, parallel.engine, parallel.exchange
Differs: replicas are fetched when the layer runs, not during the attention before it, so no communication is hidden;
    rematerialisation (an option of the engine) computes hidden units anew too. Slots are rounded to the nearest.
Claim: up to 3.54x over FasterMoE, SmartMoE, FlexMoE and expert parallelism; all-to-all time 12.3x lower.
Shown: lab.experiments.hecate
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from moekit.parallel._errors import ParallelError
from moekit.parallel._links import Grid
from moekit.parallel.dispatch import Counts, DispatchPlan, Layout, Piece

Copies = tuple[tuple[int, int], ...]
"""(expert, rank) of every replica."""


@dataclass
class Hecate:
    """A planner of one layer that remembers its loads, and so must see every iteration exactly once.

    ``overlap`` is the paper's t, ``extra`` its m, ``window`` its w. ``spare`` slots a rank are for calibration, in
    which fetching one more expert costs a rank as much as ``exposed`` rows.
    """

    grid: Grid
    overlap: int = 4
    extra: int = 2
    window: int = 5
    spare: int = 0
    exposed: float = 0.0
    history: deque[list[int]] = field(default_factory=deque)

    def predicted(self) -> list[float]:
        """[E]: mean loads of the window; empty before the first iteration."""
        return [sum(column) / len(self.history) for column in zip(*self.history, strict=True)]

    def __call__(self, counts: Counts, layout: Layout) -> DispatchPlan:
        load, expected = [sum(column) for column in zip(*counts, strict=True)], self.predicted()
        lent = materialise(expected, layout, self.grid, self.overlap, self.extra) if expected else ()
        plan = nearest(counts, layout, self.grid, lent)
        if self.spare:
            more = (*lent, *materialise(load, layout, self.grid, self.overlap, self.spare, lent))
            better = nearest(counts, layout, self.grid, more)
            fetched = max(sum(rank == r for _, r in more[len(lent) :]) for rank in range(layout.world))
            if max(better.rows()) + self.exposed * fetched < max(plan.rows()):
                plan = better
        self.history.append(load)
        while len(self.history) > self.window:
            self.history.popleft()
        return plan


def materialise(
    load: Sequence[float], layout: Layout, grid: Grid, overlap: int, extra: int, held: Collection[tuple[int, int]] = ()
) -> Copies:
    """Which experts are lent where (algorithm 1); ``held`` are replicas that exist already and take no slot.

    Raises ParallelError for a layout with sliced experts.
    """
    if layout.slices > 1:
        raise ParallelError(f"replicas are whole experts, but the layout has {layout.slices} slices of each")
    top = sorted((e for e in range(len(load)) if load[e] > 0), key=lambda e: (-load[e], e))[:overlap]
    at = {(expert, rank) for expert, rank in enumerate(layout.owner)} | set(held)
    if len(top) <= extra:
        return tuple((e, rank) for e in top for rank in range(layout.world) if (e, rank) not in at)
    free, lent, total = [extra] * layout.world, [], sum(load[e] for e in top)
    for expert in top:
        for _ in range(round(layout.world * extra * load[expert] / total)):
            rank = _roomiest(expert, grid, free, at)
            if rank is None:
                break
            free[rank] -= 1
            at.add((expert, rank))
            lent.append((expert, rank))
    return tuple(lent)


def _roomiest(expert: int, grid: Grid, free: Sequence[int], at: Collection[tuple[int, int]]) -> int | None:
    """The rank for one more replica: on a node without the expert if there is one, with most room there, with most."""
    ranks = [rank for rank in range(grid.world) if free[rank] > 0 and (expert, rank) not in at]
    served = {grid.node(rank) for rank in range(grid.world) if (expert, rank) in at}

    def room(rank: int) -> tuple[bool, int, int, int]:
        node = grid.node(rank)
        on_node = sum(free[node * grid.per_node : (node + 1) * grid.per_node])
        return node in served, -on_node, -free[rank], rank

    return min(ranks, key=room, default=None)


def nearest(counts: Counts, layout: Layout, grid: Grid, copies: Copies) -> DispatchPlan:
    """Tokens go to a replica on their rank, else evenly to those of their node, else evenly to all."""
    holders: list[set[int]] = [{rank} for rank in layout.owner]
    for expert, rank in copies:
        holders[expert].add(rank)
    pieces, reached = [], [0] * layout.num_experts
    for source, row in enumerate(counts):
        for expert, count in enumerate(row):
            ranks = sorted(holders[expert])
            near = [rank for rank in ranks if grid.node(rank) == grid.node(source)]
            chosen = [source] if source in holders[expert] else near or ranks
            start = reached[expert]
            for place, rank in enumerate(chosen):
                low, high = count * place // len(chosen), count * (place + 1) // len(chosen)
                if low < high:
                    pieces.append(Piece(expert, 0, start + low, start + high, rank))
            reached[expert] += count
    return DispatchPlan(layout, tuple(pieces), copies=copies)


def heterogeneous(loads: Sequence[Sequence[float]], grid: Grid, overlap: int) -> list[Layout]:
    """Who stores what in every layer (algorithm 2), from predicted loads [L][E].

    Ranks have equal slots over all layers together, and any number of them in one layer. Experts that will be lent (the
    top ``overlap`` of a layer) may lie anywhere; the others go by decreasing load to the least loaded rank of the least
    loaded node, layers with the heaviest of them first.
    """
    experts = len(loads[0])
    free = [-(-len(loads) * experts // grid.world)] * grid.world
    owners = [[-1] * experts for _ in loads]
    ranked = [sorted(range(experts), key=lambda e: (-layer[e], e)) for layer in loads]
    rest = [order[overlap:] for order in ranked]
    for at in sorted(range(len(loads)), key=lambda at: -max((loads[at][e] for e in rest[at]), default=0.0)):
        busy = [0.0] * grid.world

        def order(rank: int, busy: list[float] = busy) -> tuple[float, int, float, int, int]:
            node = grid.node(rank)
            mates = slice(node * grid.per_node, (node + 1) * grid.per_node)
            return sum(busy[mates]), sum(free[mates]), busy[rank], -free[rank], rank

        for expert in rest[at]:
            rank = min((rank for rank in range(grid.world) if free[rank]), key=order)
            owners[at][expert] = rank
            busy[rank] += loads[at][expert]
            free[rank] -= 1
    for at, order_E in enumerate(ranked):
        for expert in order_E[:overlap]:
            rank = max(range(grid.world), key=lambda rank: (free[rank], -rank))
            owners[at][expert] = rank
            free[rank] -= 1
    return [Layout(grid.world, tuple(owner)) for owner in owners]
