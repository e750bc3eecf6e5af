"""Page from disk, or make it smaller? The largest size of a model that can still be decoded as fast as one asks.

A model that is larger than its memory loses less and reads more. What it loses is for ``fit`` to say; what it reads
follows from the profile's routing trace, the memory that is left for experts, and the speed of the disk.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moekit.checkpoint import Checkpoint
from moekit.checkpoint.reader import Reader
from moekit.errors import BudgetError, OptionError
from moekit.plan.sizes import fixed_nbytes, source_nbytes
from moekit.profile import Profile, RoutingTrace
from moekit.run.paging import THREADS
from moekit.run.policy import policy
from moekit.run.replay import replay
from moekit.stream import gigabytes

_STEPS = 12
"""Halvings of the interval of sizes."""
_SPANS = 64
"""Reads of one expert's size that the disk's speed is measured with."""


@dataclass(frozen=True)
class Weighed:
    """``nbytes`` of weights of which ``experts`` at a time fit beside the rest; reading allows ``speed`` tokens per
    second at most, with ``rate`` bytes per second from the disk. Infinite where all experts fit."""

    nbytes: int
    experts: int
    all_experts: int
    speed: float
    rate: float

    def __str__(self) -> str:
        if self.experts >= self.all_experts:
            return f"Paging: not needed, all experts of {gigabytes(self.nbytes)} of weights fit."
        return (
            f"Paging: {gigabytes(self.nbytes)} of weights, {self.experts} of {self.all_experts} experts in memory at a "
            f"time; reading allows {self.speed:.3g} tokens/s at most (lru on the profile's trace, "
            f"{gigabytes(self.rate)}/s from the disk)."
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``tokens_per_second`` is None where nothing is read."""
        return {
            "bytes": self.nbytes,
            "experts_in_memory": self.experts,
            "experts": self.all_experts,
            "tokens_per_second": self.speed if self.experts < self.all_experts else None,
            "disk_bytes_per_second": self.rate,
        }


def weigh(source: Checkpoint, profile: Profile, memory: int, speed: float, rate: float) -> Weighed:
    """The largest size at which ``memory`` bytes (weights only) allow ``speed`` tokens per second or more.

    Every expert is taken to shrink alike. Computing is not counted: the speed is what reading alone allows.

    Raises:
        OptionError: a speed that is not positive. BudgetError: ``memory`` is less than what surrounds the experts.
        ProfileError: the profile holds no trace.
    """
    if speed <= 0:
        raise OptionError(f"a speed of {speed} tokens per second: give one above 0")
    fixed, largest = fixed_nbytes(source), source_nbytes(source)
    if memory <= fixed:
        raise BudgetError(
            f"{gigabytes(memory)} are not enough for what surrounds the experts, {gigabytes(fixed)}: give more memory"
        )
    trace = RoutingTrace.of_profile(profile)
    alone = replace(trace, step=np.arange(len(trace)))  # as if every token were decoded by itself
    low, best = memory, _at(alone, memory, memory, fixed, rate)
    high = max(largest, memory)
    for _ in range(_STEPS):
        middle = (low + high) // 2
        tried = _at(alone, middle, memory, fixed, rate)
        if tried.speed >= speed:
            low, best = middle, tried
        else:
            high = middle
    whole = _at(alone, largest, memory, fixed, rate)
    return whole if whole.speed >= speed else best


def read_rate(source: Checkpoint) -> float:
    """Bytes per second that pieces of an expert's size come from the model's own files, several at a time."""
    reader, rng = Reader(source.path, source.tensors, direct=True), np.random.default_rng(0)
    infos = sorted(source.tensors.values(), key=lambda info: -info.nbytes)[: 4 * _SPANS]
    lock, done = threading.Lock(), [0]

    def read(index: int) -> None:
        info = infos[index]
        view = memoryview(bytearray(min(info.nbytes, 2**24)))
        reader.read_into(view, info.name, 0)
        with lock:
            done[0] += len(view)

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, rng.integers(len(infos), size=_SPANS).tolist()))
    reader.close()
    return done[0] / (time.perf_counter() - started)


def _at(trace: RoutingTrace, nbytes: int, memory: int, fixed: int, rate: float) -> Weighed:
    count = sum(trace.num_experts)
    each = max((nbytes - fixed) / count, 1.0)
    capacity = min(count, int((memory - fixed) / each))
    widest = max(len(request.experts) for request in trace.requests)
    if capacity >= count:
        return Weighed(nbytes, count, count, float("inf"), rate)
    if capacity < widest:
        return Weighed(nbytes, capacity, count, 0.0, rate)
    misses = replay(trace, policy("lru"), capacity).misses
    return Weighed(nbytes, capacity, count, rate * len(trace) / max(misses * each, 1.0), rate)
