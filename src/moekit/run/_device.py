"""Experts on another device than the one whose memory they are read to: the hot ones there, the warm ones in memory.

Two stores, one above the other. The lower one reads from disk to memory under the cap on this process; the upper one
copies from memory to the device under a cap of its own, and whoever computes only knows the upper one.

Written for CUDA and tested with the CPU as the other device; copies take their turn among the device's computations
(the default stream), so they overlap with reading but not with computing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.blocks import MoEBlock
from moekit.errors import BudgetError, UnsupportedModelError
from moekit.kernels import Arrivals, ArrivingExperts
from moekit.run._layers import PagedExperts
from moekit.run._tier import Tier, Whole
from moekit.run.policy import policy
from moekit.run.store import ExpertStore
from moekit.stream import gigabytes, parse_bytes

SPARE = 1 << 28
"""Bytes of a device that are left to its libraries: their handles and workspaces come with the first products."""


class _Rows(Sequence[Tensor]):
    """One matrix of every expert of a layer; only of those that are there."""

    def __init__(self, count: int, transposed: bool) -> None:
        self.there: list[Tensor | None] = [None] * count
        self._transposed = transposed

    def __len__(self) -> int:
        return len(self.there)

    def __getitem__(self, expert: Any) -> Any:
        row = self.there[expert]
        assert row is not None, f"expert {expert} is read, but it is not there"
        return row.t() if self._transposed else row


class DeviceExperts(Whole):
    """The experts of one layer on a device, each in tensors of its own, copied from the store ``below``.

    An allocation per expert: blocks of one size, which the device's allocator hands to the next expert as they are.
    ``charge`` are bytes on the device, ``stored_bytes`` those copied.
    """

    def __init__(self, below: ExpertStore, layer: int, block: MoEBlock, device: torch.device, turn: Any) -> None:
        host = below.layers[layer]
        assert isinstance(host, PagedExperts)
        self.name, self.num_experts = host.name, host.num_experts
        self._below, self._layer, self._host, self._device, self._turn = below, layer, host, device, turn
        transposed = bool(getattr(block.experts, "is_transposed", False))
        self._rows = {name: _Rows(self.num_experts, transposed) for name in host.weights}
        self.run: Callable[[Tensor, Tensor, Tensor, Arrivals], Tensor]
        up, down = self._rows.values()
        self.run = ArrivingExperts(block.experts, (up, down))
        size = sum(weight[0].nbytes for weight in host.weights.values())
        self.charge: Sequence[int] = [size] * self.num_experts
        self.stored_bytes: Sequence[int] = self.charge

    def keep(self, expert: int) -> None:
        self._below.prefetch(self._layer, [expert])  # its disk is read while others are copied

    def drop(self, expert: int) -> None:
        for rows in self._rows.values():
            rows.there[expert] = None

    def fill(self, expert: int) -> None:
        """Copy one expert, read from disk first where it is not in memory. Raises :class:`CheckpointError`."""
        with self._turn:  # a store has one caller at a time
            self._below.begin(self._layer, [expert])
            try:
                self._below.need(self._layer, [expert])
                for name, weight in self._host.weights.items():
                    self._rows[name].there[expert] = weight[expert].to(self._device, copy=True)
            finally:
                self._below.end()


class Away:
    """A CUDA device that experts are computed on. ``cap``: what this process's tensors may take there, in all."""

    def __init__(self, device: torch.device, cap: int | float | str | None = None) -> None:
        self.device, self.cap = device, None if cap is None else parse_bytes(cap)

    def below(self, layers: Sequence[Tier], room: int | None, threads: int) -> ExpertStore:
        """What keeps experts in memory for the device, as many as there is ``room`` for (bytes; None: all).

        Raises:
            UnsupportedModelError: packed experts, which are computed on the CPU alone.
            BudgetError: no room for one of them.
        """
        if not all(isinstance(layer, PagedExperts) for layer in layers):
            raise UnsupportedModelError("packed experts are computed on the CPU: run this model without --device")
        everything = sum(sum(layer.charge) for layer in layers)
        return ExpertStore(layers, everything if room is None else min(room, everything), policy("lru"), threads)

    def tiers(self, below: ExpertStore, found: Sequence[MoEBlock]) -> list[DeviceExperts]:
        """The layers of a store, one for each block, as they are on the device."""
        turn = threading.Lock()
        return [DeviceExperts(below, layer, block, self.device, turn) for layer, block in enumerate(found)]

    def room(self, working: int) -> int:
        """Bytes left for experts beside what is there already and ``working``.

        Raises:
            BudgetError: there is not even room for that.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        held, kept = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        room = free + kept - held - SPARE
        if self.cap is not None:
            torch.cuda.set_per_process_memory_fraction(min(self.cap / total, 1.0), self.device)
            room = min(room, self.cap - held)
        if working > room:
            raise BudgetError(
                f"{self.device} has {gigabytes(max(room, 0))} left, but a context takes {gigabytes(working)}: give it "
                "more with --device-memory, a shorter context, or compute on the CPU"
            )
        return room - working
