"""The ranks that work together: process groups with a bounded patience, and one clear error where a peer is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.parallel._errors import ParallelError
from moekit.parallel._links import Grid, Traffic

PATIENCE = 60.0
"""Seconds that a rank waits for its peers."""


@dataclass
class World:
    """This process among its peers. Every rank makes it together: :meth:`join` is itself a collective call.

    Tokens and weights travel in groups of their own, so that neither waits for the other. ``node_group`` holds the
    ranks of this node, ``column_group`` the ranks with this local rank on all nodes (None on one node). A world may be
    a part of all ranks (:meth:`part`): ``rank`` is then counted within it, and ``members`` says who its ranks are.
    """

    rank: int
    grid: Grid
    patience: float
    tokens: Any
    weights: Any
    node_group: Any = None
    column_group: Any = None
    traffic: Traffic = field(default_factory=Traffic)
    members: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.grid.world

    @classmethod
    def join(cls, nodes: int = 1, patience: float = PATIENCE) -> World:
        """All ranks of the initialised default group (``torchrun``, then ``torch.distributed.init_process_group``).

        Raises ParallelError where there is no process group, or where the ranks do not divide over ``nodes``.
        """
        if not dist.is_initialized():
            raise ParallelError(
                "no process group: start with torchrun and call torch.distributed.init_process_group first"
            )
        grid = Grid.of(dist.get_world_size(), nodes)
        whole = cls(dist.get_rank(), grid, patience, None, None, members=tuple(range(grid.world)))
        return whole.part([whole.members], grid)

    def part(self, groups: Sequence[Sequence[int]], grid: Grid) -> World:
        """The one of disjoint ``groups`` of this world's ranks that this rank is in, as a world of its own kind.

        Each is laid out as ``grid`` says. A collective call: every rank names all groups, in the same order. What it
        sends is counted apart.
        """
        made: World | None = None
        with self.waiting("joining"):
            for group in groups:
                members = [self.members[rank] for rank in group]
                parts = self._groups(members, grid)
                if self.rank in group:
                    own = list(group).index(self.rank)
                    column = parts[2 + grid.nodes :][grid.local(own)] if grid.nodes > 1 else None
                    node = parts[2 + grid.node(own)] if grid.nodes > 1 else None
                    made = World(own, grid, self.patience, parts[0], parts[1], node, column, Traffic(), tuple(members))
        if made is None:
            raise ParallelError(f"rank {self.rank} of {self.size} is in none of the groups {[list(g) for g in groups]}")
        return made

    def _groups(self, members: Sequence[int], grid: Grid) -> list[Any]:
        """Tokens, weights, and with several nodes each node's and each column's; every rank makes all, in order."""
        parts: list[Sequence[int]] = [members, members]
        if grid.nodes > 1:
            parts += [members[node * grid.per_node :][: grid.per_node] for node in range(grid.nodes)]
            parts += [members[local :: grid.per_node] for local in range(grid.per_node)]
        patience = timedelta(seconds=self.patience)
        return [dist.new_group(list(part), timeout=patience) for part in parts]

    @contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Turns what the backend says about a lost peer into ParallelError."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split("] ", 1)[-1]
            raise ParallelError(
                f"rank {self.rank} of {self.size} lost its peers while {doing} ({reason}): a process has died, or kept "
                f"the others waiting for more than {self.patience:g} s; stop all ranks and start them again"
            ) from error

    def gather(self, row: Tensor, what: str = "counts") -> Tensor:
        """[W, N] from one row [N] per rank; every rank's row has the same length and dtype."""
        out = row.new_empty(self.size * row.numel())
        with self.waiting(f"gathering {what}"):
            dist.all_gather_single(out, row.contiguous(), group=self.tokens)
        for target in range(self.size):
            if target != self.rank:
                self.traffic.add(what, self.grid.level(self.rank, target), 1, row.numel() * row.element_size())
        return out.view(self.size, -1)

    def agree(self, **facts: int) -> None:
        """Raises ParallelError on every rank, naming what differs, unless all ranks give the same numbers."""
        row = torch.tensor(list(facts.values()), dtype=torch.int64)
        seen = self.gather(row.to(self.device), "handshake").cpu()
        for column, name in enumerate(facts):
            odd = (seen[:, column] != seen[0, column]).nonzero()
            if len(odd):
                other = int(odd[0])
                raise ParallelError(
                    f"ranks disagree on {name}: {seen[0, column]} on rank 0, {seen[other, column]} on rank {other}; "
                    "start all of them with the same model, layout and options"
                )

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to travel: the GPU of this process under NCCL, else the CPU."""
        backend = dist.get_backend(self.tokens)
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


@dataclass
class Pending:
    """Something under way: ``finish`` is called once, by :meth:`wait`, and gives the result."""

    finish: Callable[[], Tensor]

    def wait(self) -> Tensor:
        return self.finish()
