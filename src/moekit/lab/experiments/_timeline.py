"""When things would happen if each rank had a core and the link a stated speed: a replay of what ranks really did.

Modelled: computing takes the processor seconds that this thread really spent on it, messages take bytes over
bandwidth, one after the other in each direction pair of a rank; nothing else takes time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moekit.parallel import World, flat
from moekit.parallel._world import Pending
from moekit.parallel.exchange import Table


class Event(NamedTuple):
    """``cpu`` seconds of computing, then ``what`` ("start", "wait" or "end") of message ``number`` with ``nbytes``."""

    cpu: float
    what: str
    number: int = -1
    nbytes: int = 0


class Watched:
    """The flat exchange, noting when it is begun and waited for; give it as ``exchange``."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._messages = 0
        self._since = time.thread_time()

    def restart(self) -> None:
        self.events, self._messages, self._since = [], 0, time.thread_time()

    def __call__(self, world: World, x_SH: Tensor, rows: Table, what: str = "tokens") -> Pending:
        row = x_SH[0].numel() * x_SH.element_size() if len(x_SH) else 0
        others = [other for other in range(world.size) if other != world.rank]
        leaving = sum(rows[world.rank][other] for other in others) * row
        number, self._messages = self._messages, self._messages + 1
        pending = flat(world, x_SH, rows, what)
        self._note("start", number, leaving)

        def finish() -> Tensor:
            self._note("wait", number)
            out = pending.wait()
            self._since = time.thread_time()
            return out

        return Pending(finish)

    def end(self) -> list[Event]:
        self._note("end")
        return self.events

    def _note(self, what: str, number: int = -1, nbytes: int = 0) -> None:
        now = time.thread_time()
        self.events.append(Event(now - self._since, what, number, nbytes))
        self._since = now


def replay(logs: Sequence[Sequence[Event]], bandwidth: float) -> dict[str, float]:
    """Seconds until the last rank is done, of computing on the busiest, and of its difference: exposed communication.

    A message is on its way when all ranks have begun it and the one before it has arrived, and takes as long as the
    rank that sends most of it needs at ``bandwidth`` bytes a second.
    """
    clocks, places = [0.0] * len(logs), [0] * len(logs)
    begun: dict[int, dict[int, tuple[float, int]]] = {}
    arrived: dict[int, float] = {}
    while any(place < len(log) for place, log in zip(places, logs, strict=True)):
        moved = False
        for rank, log in enumerate(logs):
            while places[rank] < len(log):
                event = log[places[rank]]
                if event.what == "wait" and event.number not in arrived:
                    break
                clocks[rank] += event.cpu
                if event.what == "wait":
                    clocks[rank] = max(clocks[rank], arrived[event.number])
                elif event.what == "start":
                    begun.setdefault(event.number, {})[rank] = (clocks[rank], event.nbytes)
                    _send(begun, arrived, len(logs), bandwidth)
                places[rank], moved = places[rank] + 1, True
        assert moved, "ranks wait for each other"
    busiest = max(sum(event.cpu for event in log) for log in logs)
    return {"total": max(clocks), "computing": busiest, "exposed": max(clocks) - busiest}


def _send(begun: dict[int, dict[int, Any]], arrived: dict[int, float], ranks: int, bandwidth: float) -> None:
    """Messages that all ranks have begun, in order."""
    while len(arrived) in begun and len(begun[len(arrived)]) == ranks:
        parts = begun[len(arrived)].values()
        start = max(arrived.get(len(arrived) - 1, 0.0), *(at for at, _ in parts))
        arrived[len(arrived)] = start + max(nbytes for _, nbytes in parts) / bandwidth
