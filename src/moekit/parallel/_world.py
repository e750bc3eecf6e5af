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
    ranks of this node, ``column_group`` the ranks with this local rank on all nodes (None on one node).
    """

    rank: int
    grid: Grid
    patience: float
    tokens: Any
    weights: Any
    node_group: Any = None
    column_group: Any = None
    traffic: Traffic = field(default_factory=Traffic)

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
        rank, grid = dist.get_rank(), Grid.of(dist.get_world_size(), nodes)
        world = cls(rank, grid, patience, None, None)
        with world.waiting("joining"):
            world.tokens, world.weights = world._group(range(grid.world)), world._group(range(grid.world))
            if grid.nodes > 1:
                world._join_levels()
        return world

    def _group(self, ranks: Sequence[int]) -> Any:
        return dist.new_group(list(ranks), timeout=timedelta(seconds=self.patience))

    def _join_levels(self) -> None:
        """Every rank makes every group, in the same order, and keeps the two that it belongs to."""
        grid = self.grid
        for node in range(grid.nodes):
            group = self._group(range(node * grid.per_node, (node + 1) * grid.per_node))
            self.node_group = group if node == grid.node(self.rank) else self.node_group
        for local in range(grid.per_node):
            group = self._group(range(local, grid.world, grid.per_node))
            self.column_group = group if local == grid.local(self.rank) else self.column_group

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
