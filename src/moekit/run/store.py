"""Which experts are in memory, and how the others get there: one budget, one policy, a few reading threads."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from moekit.errors import BudgetError
from moekit.run._tier import Counters, Tier
from moekit.run.policy import CachePolicy, Key
from moekit.stream import gigabytes


@dataclass(eq=False)
class _Entry:
    """One expert that is there or on its way. ``state``: queued, loading or resident."""

    state: str
    demanded: bool
    used: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class ExpertStore:
    """Keeps at most ``budget`` bytes of experts in memory.

    A batch at a layer calls :meth:`begin` with all experts it needs, :meth:`need` before it reads some of them, and
    :meth:`end`. In between :meth:`prefetch` may ask for others. One caller at a time; reading threads are the store's.

    Args:
        layers: the experts of each MoE layer, in order.
        budget: bytes; at least one expert of every layer must fit.
        policy: whom to evict.
        threads: how many experts are read at the same time.

    Raises:
        BudgetError: the budget is below the largest expert.
    """

    def __init__(self, layers: Sequence[Tier], budget: int, policy: CachePolicy, threads: int = 4) -> None:
        self.layers, self.policy, self.counters = list(layers), policy, Counters()
        self.budget = 0
        self._entries: dict[Key, _Entry] = {}
        self._resident: dict[Key, None] = {}
        self._pinned: set[Key] = set()
        self._whole = True
        self._held = 0
        self._queue: list[tuple[int, int, Key]] = []
        self._number = 0
        self._errors: dict[Key, Exception] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.resize(budget)
        self._threads = [threading.Thread(target=self._work, name=f"experts-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    # -- what the model calls

    def most(self, layer: int) -> int:
        """How many experts of a layer can be there at once."""
        return max(1, self.budget // self.layers[layer].unit)

    def begin(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None = None) -> None:
        """A batch needs ``experts`` at ``layer``: what is missing is fetched, all of it at once if there is room."""
        keys = [(layer, expert) for expert in experts]
        with self._changed:
            self.policy.routed(layer, experts, scores)
            self._count(keys)
            self._whole = sum(self.layers[layer].charge[expert] for expert in experts) <= self.budget
            self._pinned = set(keys) if self._whole else set()
            if self._whole:
                for key in keys:
                    self._fetch(key, demand=True)

    def need(self, layer: int, experts: Sequence[int]) -> None:
        """Return once ``experts`` of the batch's layer are there; they stay until the next call.

        Raises:
            CheckpointError: the disk failed.
        """
        keys = [(layer, expert) for expert in experts]
        started = time.perf_counter()
        with self._changed:
            if not self._whole:
                self._pinned = set(keys)
                for key in keys:
                    self._fetch(key, demand=True)
            waiting = [self._entries[key] for key in keys if key in self._entries]
            stalled = any(entry.state != "resident" for entry in waiting)
        for entry in waiting:
            entry.done.wait()
            entry.used = True
        if any(key not in self._resident for key in keys):
            self._fail(keys)
        if stalled:
            self.counters.stall_seconds += time.perf_counter() - started

    def end(self) -> None:
        """The batch has left the layer."""
        with self._changed:
            self._pinned = set()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Fetch experts, the most wanted first, after all that is needed now, as far as the policy gives room."""
        with self._changed:
            for expert in experts:
                if not self._fetch((layer, expert), demand=False):
                    break

    def reset(self) -> None:
        """A new sequence begins."""
        with self._changed:
            self.policy.reset()

    # -- what its owner calls

    def resident(self) -> list[Key]:
        """What is in memory now."""
        with self._changed:
            return list(self._resident)

    @property
    def held_bytes(self) -> int:
        """Bytes set aside for experts that are there or on their way."""
        return self._held

    def resize(self, budget: int) -> None:
        """Another budget; what no longer fits goes."""
        largest = max(layer.unit for layer in self.layers)
        if budget < largest:
            raise BudgetError(
                f"{gigabytes(max(budget, 0))} are left for experts, but a single one takes {gigabytes(largest)}: "
                "raise the memory cap"
            )
        with self._changed:
            self.budget = budget
            while self._held > budget and self._make_room(0, next(iter(self._resident)), demand=True):
                pass

    def clear(self, policy: CachePolicy) -> None:
        """Let all experts go and start afresh under another policy; what is being read is waited for."""
        with self._changed:
            while self._cancel():
                pass
            while self._busy():
                self._changed.wait()
            for key in list(self._resident):
                self._evict(key)
            self.policy, self.counters = policy, Counters()

    def close(self) -> None:
        """Stop reading and give all memory back. What is being read is finished first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            for key in list(self._entries):
                if key in self._resident:
                    self._evict(key)
                else:
                    self._forget(key)

    def _fail(self, keys: Sequence[Key]) -> NoReturn:
        """Raise what kept ``keys`` away once all that is read was heard of: the next batch begins with no old error."""
        with self._changed:
            failed = next(self._errors[key] for key in keys if key in self._errors)
            while self._busy():
                self._changed.wait()
            self._errors.clear()
        raise failed

    # -- inside; the lock is held

    def _count(self, keys: Collection[Key]) -> None:
        counters = self.counters
        counters.requests += len(keys)
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                counters.misses += 1
            elif entry.state == "resident":
                counters.hits += 1
            else:
                counters.late += 1

    def _fetch(self, key: Key, demand: bool) -> bool:
        """Set a place aside for ``key`` and queue it; False if there is no room for a prefetch."""
        entry = self._entries.get(key)
        if entry is not None:
            if demand and entry.state == "queued" and not entry.demanded:
                entry.demanded = True
                self._push(key, 0)
            return True
        charge = self.layers[key[0]].charge[key[1]]
        if not self._make_room(charge, key, demand):
            return False
        self._held += charge
        self._errors.pop(key, None)
        self._entries[key] = _Entry("queued", demand)
        self.layers[key[0]].keep(key[1])
        self._push(key, 0 if demand else 1)
        return True

    def _push(self, key: Key, rank: int) -> None:
        self._number += 1
        heapq.heappush(self._queue, (rank, self._number, key))
        self._changed.notify_all()

    def _make_room(self, charge: int, incoming: Key, demand: bool) -> bool:
        while self._held + charge > self.budget:
            if demand and self._cancel():
                continue
            victim = self.policy.victim(self._resident, self._pinned, incoming)
            if victim is None and demand:
                victim = next((key for key in self._resident if key not in self._pinned), None)
            if victim is not None:
                self._evict(victim)
            elif not demand or not self._busy():
                return False
            else:
                self._changed.wait()  # a prefetch that is being read now can go once it is there
        return True

    def _cancel(self) -> bool:
        """Forget one prefetch that nobody has begun to read."""
        waiting = [k for k, e in self._entries.items() if e.state == "queued" and not e.demanded]
        for key in waiting[:1]:
            self._forget(key)
        return bool(waiting)

    def _busy(self) -> bool:
        return any(entry.state != "resident" for entry in self._entries.values())

    def _evict(self, key: Key) -> None:
        entry = self._entries[key]
        del self._resident[key]
        self._forget(key)
        self.policy.evicted(key)
        self.counters.evictions += 1
        if not entry.used and not entry.demanded:
            self.counters.useless_bytes += self.layers[key[0]].stored_bytes[key[1]]

    def _forget(self, key: Key) -> None:
        del self._entries[key]
        self._held -= self.layers[key[0]].charge[key[1]]
        self.layers[key[0]].drop(key[1])

    # -- reading threads

    def _work(self) -> None:
        while (key := self._next()) is not None:
            layer, started = self.layers[key[0]], time.perf_counter()
            error: Exception | None = None
            try:
                layer.fill(key[1])
            except Exception as caught:  # whatever it is, whoever waits for this expert must hear of it
                error = caught
            self._finish(key, time.perf_counter() - started, error)

    def _next(self) -> Key | None:
        with self._changed:
            while not self._closed:
                while self._queue:
                    _, _, key = heapq.heappop(self._queue)
                    entry = self._entries.get(key)
                    if entry is not None and entry.state == "queued":
                        entry.state = "loading"
                        return key
                self._changed.wait()
            return None

    def _finish(self, key: Key, seconds: float, error: Exception | None) -> None:
        with self._changed:
            entry, size = self._entries[key], self.layers[key[0]].stored_bytes[key[1]]
            self.counters.read_seconds += seconds
            if error is None:
                entry.state = "resident"
                self._resident[key] = None
                self.policy.admitted(key)
                if entry.demanded:
                    self.counters.demand_bytes += size
                else:
                    self.counters.prefetch_bytes += size
            else:
                self._errors[key] = error
                self._forget(key)
            entry.done.set()
            self._changed.notify_all()
