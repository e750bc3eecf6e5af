"""What experiments share that are run once per seed: the run over seeds, and intervals over what each seed gave.

What one seed gives is a table of tables, down to numbers; every seed gives the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from moekit.lab.experiments import Advance
from moekit.measure import Interval

Found = TypeVar("Found")
Pairs = Mapping[str, tuple[str, str, str]]


def each_seed(seeds: Sequence[int], advance: Advance, measure: Callable[[int], Found]) -> list[Found]:
    """``measure(seed)`` for every seed, in order; ``advance`` is told before each."""
    found = []
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        found.append(measure(seed))
    return found


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % t interval over seeds, for JSON."""
    return vars(Interval.over_seeds(values))


def over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same nested figures of every seed as one, each number an :func:`interval`."""
    return {
        name: over_seeds([one[name] for one in found])
        if isinstance(found[0][name], Mapping)
        else interval([one[name] for one in found])
        for name in found[0]
    }


def differences(found: Sequence[Mapping[str, Mapping[str, float]]], pairs: Pairs) -> dict[str, Any]:
    """Baseline minus ours, paired by seed, for pairs (kind, baseline, ours): above zero where ours has less."""
    return {
        name: interval([one[kind][baseline] - one[kind][ours] for one in found])
        for name, (kind, baseline, ours) in pairs.items()
    }
