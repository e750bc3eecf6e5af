"""AdaMoE (n 171): with null experts, do as many real ones as expected do the work, unevenly spent, and better?

Setting: the protocol of ``_league``, trained from nothing (the paper tunes trained models). Contestants: ``base``
(top-4 of 16) and ``top-3``; ``null, 4`` has 8 nulls and top-6, hence 4 real experts on average at balance, and
``null, 3`` has 16 nulls and top-6, hence 3. A token whose choices are all null gets nothing from the layer.

Rule, written before the first run. `shown` if and only if all of these hold:

1. ``null, 4`` and ``null, 3`` use 4 and 3 real experts per token within 10 % in every seed.
2. The number varies with the text: the correlation of a position's experts with its loss has an interval over seeds
   (95 %, t) that lies above zero for ``null, 3``.
3. Neither (null, 4 minus top-4) nor (null, 3 minus top-3) in bits per byte has an interval above zero, and that of
   (top-4 minus null, 3), the paper's fewer experts at no loss, does not lie below zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._kinds_used import follows, slots, used
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table

TOP3, NULL4, NULL3 = "top-3", "null, 4", "null, 3"
WANTED = {NULL4: 4.0, NULL3: 3.0}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters and real experts used. ``text`` is not used."""
    arms = {
        BASE: contestant(),
        TOP3: contestant(num_experts_per_tok=3),
        NULL4: contestant("adamoe-null"),
        NULL3: contestant("adamoe-null", others=["zero"] * 16),
    }
    found = league(arms, seeds, advance)
    counts = [{name: float(np.mean(slots(played[name]))) for name in WANTED} for played in found]
    figures = table(found) | {
        "used": {name: used(found, name) for name in arms},
        "slots_follow_loss": {name: follows(found, name) for name in WANTED},
        "null4_minus_top4": lead(found, NULL4, BASE),
        "null3_minus_top3": lead(found, NULL3, TOP3),
        "top4_minus_null3": lead(found, BASE, NULL3),
    }
    return Outcome(shown=holds(figures, counts), figures=figures, setting=setting(arms))


def holds(figures: Mapping[str, Any], counts: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the module's docstring; ``counts`` are real experts used per token, seed by seed."""
    return (
        all(abs(count[name] / wanted - 1) <= 0.1 for count in counts for name, wanted in WANTED.items())
        and figures["slots_follow_loss"][NULL3]["low"] > 0
        and figures["null4_minus_top4"]["low"] <= 0
        and figures["null3_minus_top3"]["low"] <= 0
        and figures["top4_minus_null3"]["high"] >= 0
    )
