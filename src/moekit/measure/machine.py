"""What moving and computing cost: laws in seconds fitted to microbenchmarks of this machine, with their error.

The pure part (:class:`Law`, :class:`CostModel`) only does arithmetic; :func:`measure_products`, :func:`measure_disk`
and :func:`measure_link` time things and return samples for :meth:`Law.fit`. Whatever is computed from a cost model is
modelled, not measured, and should be called so.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from moekit.errors import OptionError

INTRA, INTER = "intra", "inter"
"""Levels of links: between devices of one node, and between nodes."""
_BLOCK = 4096


@dataclass(frozen=True)
class Law:
    """Seconds as a sum of ``rates[name] * amount[name]``; the feature "call" is 1 per call (the latency).

    ``error`` is the mean of ``|fitted / measured - 1|`` over ``samples`` measurements and ``worst`` the largest; both
    are nan for a law that was assumed and not fitted.
    """

    rates: Mapping[str, float]
    error: float = float("nan")
    worst: float = float("nan")
    samples: int = 0

    def __call__(self, **amounts: Any) -> Any:
        """Seconds of one call that handles these amounts (numbers or arrays of one shape)."""
        known = {"call": 1.0, **amounts}
        if set(known) - {"call"} != set(self.rates) - {"call"}:
            wanted = sorted(set(self.rates) - {"call"})
            raise OptionError(f"this law counts {', '.join(wanted)}: it was asked for {', '.join(sorted(amounts))}")
        return sum(rate * np.asarray(known[name], float) for name, rate in self.rates.items())

    @property
    def measured(self) -> bool:
        return self.samples > 0

    @classmethod
    def fit(cls, amounts: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> Law:
        """Non-negative least squares on relative errors, so that short calls count as much as long ones.

        Raises OptionError where there are fewer samples than rates, or a time is not positive.
        """
        measured = np.asarray(seconds, float)
        columns = {"call": np.ones(len(measured)), **{k: np.asarray(v, float) for k, v in amounts.items()}}
        if len(measured) < len(columns) or not (measured > 0).all():
            raise OptionError(
                f"{len(measured)} samples cannot give {len(columns)} rates: measure {len(columns)} or more, "
                "each longer than 0 s"
            )
        matrix = np.stack(list(columns.values()), 1) / measured[:, None]
        scale = np.abs(matrix).max(0)
        rates, _ = nnls(matrix / scale, np.ones(len(measured)))
        rates /= scale
        off = np.abs(matrix @ rates - 1)
        return cls(dict(zip(columns, rates.tolist(), strict=True)), float(off.mean()), float(off.max()), len(measured))


@dataclass(frozen=True)
class CostModel:
    """``links`` by level count bytes, ``product`` counts flops and bytes of weights, ``disk`` counts bytes read."""

    product: Law
    disk: Law
    links: Mapping[str, Law] = field(default_factory=dict)

    @classmethod
    def fit(cls, folder: Path | None = None, *, quick: bool = False) -> CostModel:
        """Measure this machine: one thread's products, reads of ``folder``'s disk past the page cache, and messages
        between two processes (gloo over loopback), which stand for devices of one node.

        ``quick`` takes fewer and smaller samples. A link between nodes cannot be measured here: assume one with
        :meth:`with_link`.
        """
        return cls(
            product=Law.fit(*measure_products(quick=quick)),
            disk=Law.fit(*measure_disk(folder, quick=quick)),
            links={INTRA: Law.fit(*measure_link(quick=quick))},
        )

    def with_link(self, level: str, latency: float, bandwidth: float) -> CostModel:
        """With an assumed link: seconds per message, bytes per second. Its error stays nan: nothing was measured."""
        if latency < 0 or bandwidth <= 0:
            raise OptionError(f"a link of latency {latency} s and {bandwidth} bytes/s cannot be: both must be positive")
        return CostModel(
            self.product, self.disk, {**self.links, level: Law({"call": latency, "nbytes": 1 / bandwidth})}
        )

    def expert(self, rows: Any, hidden: int, inner: int, itemsize: int = 4) -> Any:
        """Seconds for one gated expert (three products of H x I) on some rows (a number or an array)."""
        weights = hidden * inner * itemsize
        return 3 * self.product(flops=2.0 * hidden * inner * np.asarray(rows, float), nbytes=weights)

    def message(self, nbytes: Any, level: str = INTRA) -> Any:
        """Seconds for one message of ``nbytes``. Raises OptionError for a level that was neither fitted nor assumed."""
        if level not in self.links:
            known = ", ".join(self.links) or "none"
            raise OptionError(f"the cost model has no '{level}' link (it has {known}): assume one with with_link")
        return self.links[level](nbytes=nbytes)

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it: rates in seconds per call, flop or byte, and the error of each fit."""
        return asdict(self)

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> CostModel:
        links = {name: Law(**law) for name, law in data["links"].items()}
        return cls(Law(**data["product"]), Law(**data["disk"]), links)


Samples = tuple[dict[str, list[float]], list[float]]
"""Amounts by name, and seconds, of the same calls."""


def fastest(call: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of some calls, after one that is not timed: what the machine can do when left alone.

    ``time.thread_time`` as clock leaves out what others took of the processor; right for one thread that never waits.
    """
    call()
    taken = []
    for _ in range(repeats):
        begun = clock()
        call()
        taken.append(clock() - begun)
    return max(min(taken), 1e-9)


def measure_products(*, quick: bool = False) -> Samples:
    """x [rows, n] @ w [n, m] in float32 on one thread, in processor time; weights that fit stay in the cache."""
    sizes = [(64, 192), (256, 512)] if quick else [(64, 192), (192, 64), (256, 512), (512, 512), (768, 1024)]
    rows_of = (1, 16, 128) if quick else (1, 4, 16, 64, 256, 1024)
    amounts: dict[str, list[float]] = {"flops": [], "nbytes": []}
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n, m in sizes:
            weight = torch.randn(n, m)
            for rows in rows_of:
                x = torch.randn(rows, n)
                seconds.append(fastest(partial(torch.matmul, x, weight), 5 if quick else 15, time.thread_time))
                amounts["flops"].append(2.0 * rows * n * m)
                amounts["nbytes"].append(4.0 * n * m)
    finally:
        torch.set_num_threads(threads)
    return amounts, seconds


def measure_disk(folder: Path | None = None, *, quick: bool = False) -> Samples:
    """Reads of a file past the page cache (O_DIRECT; where that is refused, the pages are dropped before each read)."""
    sizes = [1 << k for k in ((14, 16, 18) if quick else (14, 16, 18, 20, 22))]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "blocks"
        path.write_bytes(os.urandom(max(sizes) * 4))
        with path.open("rb") as written:
            os.fsync(written.fileno())
        seconds = [fastest(_reader(path, size), 3 if quick else 8) for size in sizes]
    return {"nbytes": [float(size) for size in sizes]}, seconds


def _reader(path: Path, size: int) -> Callable[[], Any]:
    """A function that reads ``size`` bytes, somewhere else in the file each time."""
    places = iter(range(0, 1 << 60, size + _BLOCK))
    limit = path.stat().st_size - size

    def read() -> None:
        offset = next(places) % (limit // _BLOCK + 1) * _BLOCK
        flags, buffer = os.O_RDONLY | getattr(os, "O_DIRECT", 0), mmap.mmap(-1, size)
        try:
            file = os.open(path, flags)
        except OSError:  # a file system without direct reads
            file = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.preadv(file, [buffer], offset)
        finally:
            os.close(file)
            buffer.close()

    return read


def measure_link(*, quick: bool = False) -> Samples:
    """Messages of bytes from one process to another and back, halved: gloo over loopback."""
    from moekit.measure import _link

    sizes = [1 << k for k in ((8, 14, 18) if quick else (8, 12, 16, 18, 20, 22, 24))]
    return {"nbytes": [float(size) for size in sizes]}, _link.round_trips(sizes, 5 if quick else 20)
