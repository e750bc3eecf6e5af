"""MoE++ (n 89): do experts that cost nothing take the tokens that need nothing, at no loss?

Setting: the protocol of ``_league``. Contestants: the base recipe (top-4 of 16, weights made to sum to 1); ``vanilla``,
the same with MoE++'s raw weights and capacities; ``moe++`` with tau = 0.75 and ``moe++, 0.25``, each with one zero, one
copy and two constant experts besides; ``no residual``, moe++ without gating residuals.

Rule, written before the first run. `shown` if and only if all of these hold (95 % t intervals over seeds):

1. The interval of (moe++ minus vanilla) in bits per byte does not lie above zero.
2. moe++ uses fewer than 4 feed-forward experts per token, and moe++ with tau = 0.25 fewer still, in every seed.
3. Positions with more loss use more of them: the interval of the correlation for moe++ lies above zero.

Reported, deciding nothing: (no residual minus moe++), and the balance of loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._kinds_used import follows, slots, used
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table

VANILLA, PLUS, LESS, PLAIN = "vanilla", "moe++", "moe++, 0.25", "no residual"


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters and feed-forward experts used. ``text`` is not used."""
    raw = {"weigh": {"kind": "scores", "normalise": False}, "select": {"kind": "capped", "factor": 1.1}}
    arms = {
        BASE: contestant(),
        VANILLA: contestant(router=raw),
        PLUS: contestant("moe-plus-plus"),
        LESS: contestant(
            "moe-plus-plus",
            router={"select": {"kind": "capped", "factor": 1.1, "share": 0.25}},
            balance={"load": {"kind": "kind-load", "weight": 0.01, "others": 0.25}},
        ),
        PLAIN: contestant("moe-plus-plus", router={"score": "linear"}),
    }
    found = league(arms, seeds, advance)
    counts = [{name: float(np.mean(slots(played[name]))) for name in arms} for played in found]
    figures = table(found) | {
        "used": {name: used(found, name) for name in arms},
        "slots_follow_loss": follows(found, PLUS),
        "plus_minus_vanilla": lead(found, PLUS, VANILLA),
        "plus_minus_base": lead(found, PLUS, BASE),
        "no_residual_minus_plus": lead(found, PLAIN, PLUS),
    }
    return Outcome(shown=holds(figures, counts), figures=figures, setting=setting(arms))


def holds(figures: Mapping[str, Any], counts: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the module's docstring; ``counts`` are experts used per token, seed by seed."""
    return (
        figures["plus_minus_vanilla"]["low"] <= 0
        and all(count[LESS] < count[PLUS] < 4 for count in counts)
        and figures["slots_follow_loss"]["low"] > 0
    )
