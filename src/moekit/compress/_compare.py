"""Any set of methods at equal bytes: one table, one curve, one document, with intervals over seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moekit.compress._arena import FIT, Arena
from moekit.compress._options import methods
from moekit.compress._within import chain
from moekit.errors import OptionError
from moekit.measure import Interval

BASELINES = ("random", "frequency", "average", "rtn", "gptq")
"""What every comparison carries, as far as it is there."""
DRAWS = 4
"""Draws of the random baselines per seed; their mean counts."""


@dataclass(frozen=True)
class Entry:
    """One method at one ratio with one seed: the setting that fitted, its bytes, KL in nats per token by domain, and
    the ``seconds`` it took. Where no setting fits there is none, and nothing else either."""

    method: str
    setting: str | None
    ratio: float
    seed: int
    nbytes: int
    domains: dict[str, float]
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, float, int]:
        return self.method, self.ratio, self.seed

    @property
    def kl(self) -> float:
        """Domains weighing alike."""
        return float(np.mean(list(self.domains.values())))


@dataclass(frozen=True)
class Row:
    """One method at one ratio: intervals over seeds; ``nbytes`` of the largest."""

    method: str
    setting: str
    ratio: float
    nbytes: int
    kl: Interval
    domains: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """``left_out``: methods that no setting fits into a ratio's bytes, for some seed at least."""

    model: str
    fingerprint: str
    source_nbytes: int
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    left_out: tuple[tuple[str, float], ...]

    def rows(self) -> list[Row]:
        """By ratio, the least loss first."""
        found = []
        for ratio in self.ratios:
            names = dict.fromkeys(entry.method for entry in self.entries if entry.ratio == ratio)
            found += sorted((self._row(name, ratio) for name in names), key=lambda row: row.kl.mean)
        return found

    def _row(self, name: str, ratio: float) -> Row:
        mine = [e for e in self.entries if e.method == name and e.ratio == ratio]
        domains = {d: Interval.over_seeds([e.domains[d] for e in mine]) for d in mine[0].domains}
        largest = max(e.nbytes for e in mine)
        return Row(name, str(mine[0].setting), ratio, largest, Interval.over_seeds([e.kl for e in mine]), domains)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "source_bytes": self.source_nbytes,
            "seeds": list(self.seeds),
            "rows": [asdict(row) for row in self.rows()],
            "left_out": [{"method": name, "ratio": ratio} for name, ratio in self.left_out],
        }


def compare(
    arena: Arena,
    specs: Iterable[str],
    ratios: Sequence[float],
    seeds: Sequence[int],
    *,
    model: str = "",
    known: Iterable[Entry] = (),
    keep: Callable[[Entry], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run every chain ``A/B/...`` (and ``fit``, and the baselines) at each ratio of bytes removed, for each seed.

    ``known`` entries are not run again, and ``keep`` is handed every new one as soon as it is there: a run that was
    broken off goes on where it was.

    Raises:
        OptionError: an unknown method, or a ratio outside 0 to 1.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise OptionError(f"ratio {ratio:g} is no share of the bytes to remove: give one between 0 and 1")
    wanted = contestants(specs)
    there = {entry.key: entry for entry in known}
    jobs = [(name, ratio, seed) for seed in seeds for ratio in ratios for name in wanted]
    for done, job in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs))
        if job not in there:
            there[job] = _entry(arena, *job)
            if keep is not None:
                keep(there[job])
    found = [there[job] for job in jobs]
    return Comparison(
        model or str(arena.source.path),
        arena.source.fingerprint,
        arena.whole_bytes,
        tuple(ratios),
        tuple(seeds),
        tuple(entry for entry in found if entry.setting is not None),
        tuple(dict.fromkeys((entry.method, entry.ratio) for entry in found if entry.setting is None)),
    )


def contestants(specs: Iterable[str]) -> list[str]:
    """The named chains, then the baselines that are there, each once. OptionError for an unknown method."""
    named = list(dict.fromkeys(specs))
    for spec in named:
        if spec != FIT:
            chain(spec)
    return named + [name for name in BASELINES if name in methods() and name not in named]


def _entry(arena: Arena, name: str, ratio: float, seed: int) -> Entry:
    started, budget = time.monotonic(), int((1 - ratio) * arena.whole_bytes)
    drawn = name.split("/")[0].partition(":")[0] in ("random", "average") and "seed=" not in name
    tries = [_seeded(name, DRAWS * seed + i) for i in range(DRAWS)] if drawn else [name]
    found = [one for one in (arena.within(spec, seed, budget) for spec in tries) if one is not None]
    if not found:
        return Entry(name, None, ratio, seed, 0, {}, time.monotonic() - started)
    losses = [arena.losses(plan, seed) for _, plan in found]
    domains = {d: float(np.mean([loss[d] for loss in losses])) for d in losses[0]}
    largest = max(arena.nbytes(plan) for _, plan in found)
    return Entry(name, found[0][0], ratio, seed, largest, domains, time.monotonic() - started)


def _seeded(spec: str, seed: int) -> str:
    first, slash, rest = spec.partition("/")
    return f"{first}{',' if ':' in first else ':'}seed={seed}{slash}{rest}"
