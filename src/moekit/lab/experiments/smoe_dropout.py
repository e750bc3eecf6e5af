"""SMoE-Dropout (n 182): is a dense layer better trained in random parts, and is it then usable with any number of them?

Setting: the protocol of ``_league``. Contestants: the base recipe; ``dense``, one feed-forward as wide as the 16
experts together; ``learnt``, the base with 2 experts per token; ``random``, the recipe: a frozen router and 8 of 16
experts growing to all. ``learnt`` and ``random`` are judged further with 1, 2, 4, 8, 12 and 16 experts per token.
Parts of a run with fewer experts are cheaper: equal steps favour the dense model's budget.

Rule, written before the first run. `shown` if and only if all of these hold:

1. means over seeds of ``random`` never rise from 2 experts to 4, 8, 12 and 16;
2. the 95 % t interval of (dense minus random, both whole) in bits per byte lies above zero;
3. the mean of ``learnt`` is best at fewer than 16 experts.

Dropout in a dense layer, the paper's second baseline, is not tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import means
from moekit.lab.experiments._league import BASE, contestant, lead, setting, table
from moekit.lab.experiments._probing import bits, league, probes
from moekit.nn.elastic import restricted
from moekit.train.recipe import Recipe

KEY, DENSE, LEARNT, RANDOM = "smoe-dropout", "dense", "learnt", "random"
SLOTS = (1, 2, 4, 8, 12, 16)


def arms() -> dict[str, Recipe]:
    """The contestants."""
    base = contestant()
    width = base.model["num_experts"] * base.model["moe_intermediate_size"]
    return {
        BASE: base,
        DENSE: contestant(feed_forward="dense", intermediate_size=width),
        LEARNT: contestant(num_experts_per_tok=2),
        RANDOM: contestant(KEY),
    }


def slots(model: Any, seed: int) -> dict[str, float]:
    """Bits per byte with every number of experts per token."""
    found = {}
    for k in SLOTS:
        with restricted(model, k=k):
            found[f"at {k}"] = bits(model, seed)
    return found


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters and loss by experts per token. ``text`` is not used."""
    found = league(arms(), seeds, advance, "slots", {LEARNT: slots, RANDOM: slots})
    at = probes(found)
    courses = {arm: [float(np.mean([one[f"{arm} at {k}"] for one in at])) for k in SLOTS] for arm in (LEARNT, RANDOM)}
    ahead = lead(found, DENSE, RANDOM)
    figures = table(found) | {
        "slots": means(at),
        "dense_minus_random": ahead,
        "base_minus_random": lead(found, BASE, RANDOM),
    }
    return Outcome(
        shown=holds(courses[RANDOM], courses[LEARNT], ahead["low"]), figures=figures, setting=setting(arms())
    )


def holds(random: Sequence[float], learnt: Sequence[float], low: float) -> bool:
    """The rule of the module's docstring."""
    falling = all(later <= earlier for earlier, later in pairwise(random[1:]))
    return falling and low > 0 and int(np.argmin(learnt)) < len(SLOTS) - 1
