"""Top-p routing (n 8): at no more experts per token, is a varying number of them better than two for everyone?

Setting: the protocol of ``_league``. Contestants: ``top-2`` of 16 experts; ``top-p`` with p = 0.4 and the entropy term;
``top-p, no entropy`` without it; the base recipe (top-4) for reference.

Rule, written before the first run. `shown` if and only if all of these hold:

1. top-p uses fewer than 2 experts per token and layer in every seed.
2. The 95 % t interval over seeds of (top-p minus top-2) in bits per byte does not lie above zero.
3. Without the entropy term more experts are used: the interval of that difference lies above zero.
4. The correlation of a position's experts with its loss is above zero, as an interval over seeds.

Reported besides: experts by layer (the paper: lower layers use more).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap
from moekit.lab.experiments._kinds_used import follows, slots, used
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table

TOP2, TOPP, FREE = "top-2", "top-p", "top-p, no entropy"


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters, and what was used of the experts. ``text`` is not used."""
    arms = {
        BASE: contestant(),
        TOP2: contestant(num_experts_per_tok=2),
        TOPP: contestant("top-p-route"),
        FREE: contestant("top-p-route", balance={"entropy": 0.0}),
    }
    found = league(arms, seeds, advance)
    counts = [{name: float(np.mean(slots(played[name]))) for name in arms} for played in found]
    figures = table(found) | {
        "used": {name: used(found, name) for name in arms},
        "used_by_layer": {
            name: np.mean([slots(played[name]) for played in found], axis=0).round(3).tolist() for name in arms
        },
        "topp_minus_top2": lead(found, TOPP, TOP2),
        "used_more_without_entropy": gap(counts, FREE, TOPP),
        "slots_follow_loss": follows(found, TOPP),
    }
    return Outcome(shown=holds(figures, counts), figures=figures, setting=setting(arms))


def holds(figures: Mapping[str, Any], counts: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the module's docstring; ``counts`` are experts used per token, seed by seed."""
    return (
        all(count[TOPP] < 2 for count in counts)
        and figures["topp_minus_top2"]["low"] <= 0
        and figures["used_more_without_entropy"]["low"] > 0
        and figures["slots_follow_loss"]["low"] > 0
    )
