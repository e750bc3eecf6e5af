"""Sigma-MoE-Tiny (n 70): does beginning with more slots in lower layers leave them balanced at one, and is it cheap?

Setting: the protocol of ``_league``, 32 experts of which a token uses one. Contestants: the base recipe (for the
scale); ``one``, one slot everywhere from the start; ``stepwise``, the recipe: 4, 4, 2, 2, 1, 1 slots until 80 % of the
run; and ``one, longer``, as ``one`` with more steps: as many active parameters times tokens as ``stepwise`` sees.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of

1. (stepwise minus one, longer) in the load of the least used expert of the first layer over the mean load, and
2. (one, longer minus stepwise) in bits per byte

both lie above zero. The heaviest load and the loss around the switch are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table
from moekit.train.recipe import Recipe

KEY, ONE, STEPWISE, LONGER = "sigma-moe-tiny", "one", "stepwise", "one, longer"
EARLY = (4, 4, 2, 2, 1, 1)
SWITCH = 0.8


def arms() -> dict[str, Recipe]:
    """The contestants."""
    recipe = contestant(KEY)
    one = replace(recipe, schedule=())
    longer = one.with_options(steps=round(recipe.options.steps * dearer(recipe)))
    return {BASE: contestant(), ONE: one, STEPWISE: recipe, LONGER: longer}


def dearer(recipe: Recipe) -> float:
    """Active parameters of the recipe over the run, over those with one slot everywhere."""
    model = recipe.build()
    stacked = [p for name, p in model.named_parameters() if ".experts." in name]
    expert = sum(p.numel() for p in stacked) / (len(EARLY) * recipe.model["num_experts"])
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in stacked)
    slots = SWITCH * sum(EARLY) + (1 - SWITCH) * len(EARLY)
    return (rest + expert * slots) / (rest + expert * len(EARLY))


def first_layer(found: Sequence[Mapping[str, Mapping[str, Any]]], extreme: Any) -> list[dict[str, float]]:
    """The least or heaviest load of the first layer over its mean, seed by seed."""
    return [
        {name: float(extreme(one["load"][0]) / np.mean(one["load"][0])) for name, one in played.items()}
        for played in found
    ]


def jump(course: Sequence[float]) -> float:
    """By how much the training loss is higher just after the switch than just before it (stretches of the course)."""
    place = round(SWITCH * len(course))
    return float(course[place] - course[place - 1])


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters and the load of the first layer. ``text`` is not used."""
    found = league(arms(), seeds, advance)
    least = first_layer(found, np.min)
    gaps = {"least load": gap(least, STEPWISE, LONGER), "bits_per_byte": lead(found, LONGER, STEPWISE)}
    figures = table(found) | {
        "first_layer_least": means(least),
        "first_layer_most": means(first_layer(found, np.max)),
        "gap": gaps,
        "one_minus_stepwise": lead(found, ONE, STEPWISE),
        "jump": means([{STEPWISE: jump(one[STEPWISE]["course"]["cross_entropy"])} for one in found]),
        "dearer": round(dearer(arms()[STEPWISE]), 3),
    }
    return Outcome(shown=holds(gaps), figures=figures, setting=setting(arms()))


def holds(gaps: Mapping[str, Mapping[str, float]]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in gaps.values())
