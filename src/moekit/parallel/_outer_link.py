"""The link between workers that train apart: exchanges that are in flight while training goes on, counted and bounded.

Every exchange is an asynchronous collective of torch.distributed. A slow link can be emulated: what arrived is then
held back until it could have arrived over a link of that speed; figures measured so are to be called emulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.errors import OptionError
from moekit.parallel._errors import ParallelError


@dataclass(frozen=True)
class SlowLink:
    """An emulated link: ``bandwidth`` in bytes per second of each worker, ``latency`` in seconds per exchange."""

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.latency >= 0):
            raise OptionError(
                f"bandwidth={self.bandwidth:g} must be above 0 and latency={self.latency:g} must not be negative"
            )


@dataclass
class Exchanged:
    """What one worker exchanged so far.

    ``uploaded`` are the bytes it put in (what a server or a switch would receive), ``carried`` those that it sends in
    a ring: (W - 1) b for a gather of b, 2 (W - 1) / W b for a sum. ``largest`` is the largest upload of one exchange,
    ``shared`` the bytes of broadcasts. ``stalled`` are seconds spent waiting; ``needed`` the seconds that an emulated
    link needs for all.
    """

    exchanges: int = 0
    uploaded: int = 0
    carried: int = 0
    largest: int = 0
    shared: int = 0
    stalled: float = 0.0
    needed: float = 0.0


class Pending:
    """An exchange in flight."""

    def __init__(self, link: Link, work: Any, what: str, ready: float, result: Callable[[], Any]) -> None:
        self.link, self._work, self._what, self._ready, self._result = link, work, what, ready, result

    def take(self) -> Any:
        """Wait for it, at most as long as the link allows; raises :class:`ParallelError`."""
        start = time.monotonic()
        self.link.wait(self._work, self._what)
        time.sleep(max(0.0, self._ready - time.monotonic()))
        self.link.traffic.stalled += time.monotonic() - start
        return self._result()


class Link:
    """The workers of a process group (by default all), each of which starts the same exchanges in the same order.

    ``timeout`` in seconds bounds every wait. Raises :class:`ParallelError` where torch.distributed is not initialised.
    """

    def __init__(self, group: Any = None, *, timeout: float = 60.0, slow: SlowLink | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ParallelError(
                "workers are not connected: call torch.distributed.init_process_group first, or start with torchrun"
            )
        if dist.get_backend(group) == "nccl":
            raise OptionError(
                "fragments travel from the CPU, while the GPU trains on, and NCCL cannot carry them: give the link a "
                "group of its own, torch.distributed.new_group(backend='gloo')"
            )
        if timeout <= 0:
            raise OptionError(f"timeout={timeout:g} is a number of seconds above 0")
        self.group, self.timeout, self.slow = group, timeout, slow
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Exchanged()
        self._free = 0.0

    def sum(self, x_N: Tensor, what: str) -> Pending:
        """The sum of everybody's float32 [N], bit for bit the same everywhere."""
        total = x_N.clone()
        work = self._start(lambda: dist.all_reduce(total, group=self.group, async_op=True), what)
        ready = self._count(4 * len(x_N), 2 * (self.world - 1) * 4 * len(x_N) // self.world)
        return Pending(self, work, what, ready, lambda: total)

    def gather(self, payload: Tensor, what: str) -> Pending:
        """Everybody's payload, a list in the order of ranks; all are of one shape and type."""
        got = [torch.empty_like(payload) for _ in range(self.world)]
        work = self._start(lambda: dist.all_gather(got, payload.contiguous(), group=self.group, async_op=True), what)
        size = payload.numel() * payload.element_size()
        return Pending(self, work, what, self._count(size, (self.world - 1) * size), lambda: got)

    def agree(self, values: Sequence[int]) -> list[list[int]]:
        """Everybody's whole numbers, by rank; not counted."""
        mine = torch.tensor(list(values), dtype=torch.int64)
        got = [torch.empty_like(mine) for _ in range(self.world)]
        what = "first contact"
        self.wait(self._start(lambda: dist.all_gather(got, mine, group=self.group, async_op=True), what), what)
        return [list(map(int, row.tolist())) for row in got]

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give everybody the first worker's values, in place."""
        for tensor in tensors:
            values, what = tensor.detach().to("cpu").contiguous(), "sharing of the first weights"
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            send = _broadcast(values, source, self.group)
            self.wait(self._start(send, what), what)
            tensor.copy_(values)
            self.traffic.shared += values.numel() * values.element_size()

    def wait(self, work: Any, what: str) -> None:
        """Raises :class:`ParallelError` where the exchange fails or the time is up."""
        start = time.monotonic()
        try:
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self._lost(what, time.monotonic() - start) from error

    def _start(self, begin: Callable[[], Any], what: str) -> Any:
        try:
            return begin()
        except RuntimeError as error:
            raise self._lost(what, 0.0) from error

    def _lost(self, what: str, waited: float) -> ParallelError:
        return ParallelError(
            f"worker {self.rank} of {self.world}: the exchange '{what}' failed after {waited:.1f} s (at most "
            f"{self.timeout:g}): another worker was lost or is too late; start all of them again from their folders"
        )

    def _count(self, uploaded: int, carried: int) -> float:
        """Count an exchange; returns when an emulated link would have delivered it."""
        traffic = self.traffic
        traffic.exchanges += 1
        traffic.uploaded += uploaded
        traffic.carried += carried
        traffic.largest = max(traffic.largest, uploaded)
        if self.slow is None:
            return 0.0
        needed = self.slow.latency + carried / self.slow.bandwidth
        traffic.needed += needed
        self._free = max(self._free, time.monotonic()) + needed
        return self._free


def _broadcast(values: Tensor, source: int, group: Any) -> Callable[[], Any]:
    return lambda: dist.broadcast(values, source, group=group, async_op=True)
