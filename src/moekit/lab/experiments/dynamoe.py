"""DynaMoE (n 21): does it matter how many experts each layer has, and does a percentile spend them better than top-k?

Setting: the protocol of ``_league``. Six schedules over depth between 8 and 24 experts, scaled to the same 96 in all, a
quarter of them used by a percentile over the batch; ``static`` is the base recipe: 16 in every layer, top-4.

Rule, written before the first run. `shown` if and only if the 95 % t interval over seeds of (uniform minus descending)
in bits per byte lies above zero and its mean above the standard deviation over seeds of uniform, or the same is true of
(uniform minus ascending): the paper's claim for language models is that one of the two is best, by size; both are
reported. Differences within the deviation of seeds falsify it. Further reported: the spread of the six means, experts
used per token, and, for the variance of gradients that the sheet asks for, how much the loss, by stretches of 20 steps,
strays from a line through the last third of training, dynamic against static.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._kinds_used import used
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table
from moekit.nn.depth import DEPTHS
from moekit.train.recipe import Recipe

UNIFORM, LAYERS_TOTAL = "uniform", {"low": 8, "high": 24, "total": 96}


def arms() -> dict[str, Recipe]:
    """The contestants."""
    return {BASE: contestant()} | {
        kind: contestant("dynamoe", num_experts={"kind": kind, **LAYERS_TOTAL}) for kind in DEPTHS
    }


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses and parameters of every schedule. ``text`` is not used."""
    contestants = arms()
    found = league(contestants, seeds, advance)
    means = [float(np.mean([played[kind]["bits_per_byte"] for played in found])) for kind in DEPTHS]
    noise = float(np.std([played[UNIFORM]["bits_per_byte"] for played in found], ddof=1)) if len(found) > 1 else 0.0
    figures = table(found) | {
        "uniform_minus": {kind: lead(found, UNIFORM, kind) for kind in DEPTHS if kind != UNIFORM},
        "static_minus_uniform": lead(found, BASE, UNIFORM),
        "spread_of_schedules": round(max(means) - min(means), 5),
        "deviation_of_seeds": round(noise, 5),
        "used": {name: used(found, name) for name in contestants},
        "late_fluctuation": {name: fluctuation([played[name] for played in found]) for name in (BASE, UNIFORM)},
    }
    return Outcome(shown=holds(figures), figures=figures, setting=setting(contestants))


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    ahead = (figures["uniform_minus"][kind] for kind in ("descending", "ascending"))
    return any(one["low"] > 0 and one["mean"] > figures["deviation_of_seeds"] for one in ahead)


def fluctuation(played: Sequence[Mapping[str, Any]]) -> float:
    """Mean over seeds of the standard deviation around a line through the last third of the (thinned) course."""
    deviations = []
    for one in played:
        course = one["course"]["cross_entropy"]
        late = np.asarray(course[-(len(course) // 3) :])
        place = np.arange(len(late))
        deviations.append(float(np.std(late - np.polyval(np.polyfit(place, late, 1), place))))
    return round(float(np.mean(deviations)), 5)
