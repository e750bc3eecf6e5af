"""EvoMoE (n 91): does a gate that cools from dense to sparse beat one that is sparse from the start, for its price?

Setting: the protocol of ``_league``, 16 experts of which a token uses one at the end. Contestants: the base recipe
(for the scale); ``switch``, top-1 with raw softmax weights; ``evolved``, the recipe: one expert for 10 % of the run,
then 16 masked copies of it behind the cooling gate, top-1 from 80 % on; ``gate``, without the first phase; and
``switch, longer``, as many active parameters times tokens as ``evolved`` has seen, counted while it trained.

Rule, written before the first run. `shown` if and only if all of these hold:

1. the 95 % t intervals over seeds of (switch minus evolved) and (switch, longer minus evolved) in bits per byte lie
   above zero;
2. experts per token, mean over seeds and tenths of the run, never rise from the second tenth on, and are 1 at the end.

That experts per token are 1 at the end is the schedule's doing, and checks the code. How many experts a token used just
before the cut to one, and what the first phase adds, are reported. The sheet warns of a cut before the gate has cooled
to one by itself: here 2.9 experts (2.4 to 3.3) are in use when it comes, with the paper's temperatures, so a part of
what is lost may be the cut's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import means
from moekit.lab.experiments._league import BASE, contestant, lead, play, setting, table
from moekit.lab.experiments._probing import slots
from moekit.train.recipe import Recipe

KEY, SWITCH, EVOLVED, GATE, LONGER = "evomoe", "switch", "evolved", "gate", "switch, longer"
CUT, TENTHS = 0.8, 10


def arms() -> dict[str, Recipe]:
    """The contestants but for the one whose length is counted."""
    recipe = contestant(KEY)
    cooling = tuple(entry for entry in recipe.schedule if not entry["set"].endswith(".alone"))
    raw = {"weigh": {"kind": "scores", "normalise": False}}
    return {
        BASE: contestant(),
        SWITCH: contestant(num_experts_per_tok=1, router=raw),
        EVOLVED: recipe,
        GATE: replace(contestant(KEY, experts="stacked"), schedule=cooling),
    }


def as_dear(switch: Recipe, course: Sequence[float]) -> Recipe:
    """The recipe of one expert per token with as many active parameters times tokens as such a course of experts."""
    model = switch.build()
    stacked = [p for name, p in model.named_parameters() if ".experts." in name]
    experts = sum(p.numel() for p in stacked) / switch.model["num_experts"]
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in stacked)
    dearer = (rest + experts * float(np.mean(course))) / (rest + experts)
    return switch.with_options(steps=round(switch.options.steps * dearer))


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters, experts per token over the run, and the lead over the switch. ``text`` is not used."""
    found, courses = [], []
    for number, seed in enumerate(seeds):
        contestants = arms()
        courses.append(slots(contestants[EVOLVED], seed))
        contestants[LONGER] = as_dear(contestants[SWITCH], courses[-1])
        played = {}
        for place, (name, recipe) in enumerate(contestants.items()):
            advance(number * len(contestants) + place, len(seeds) * len(contestants))
            played[name] = play(recipe, seed)
        found.append(played)
    tenths = [float(np.mean(part)) for part in np.array_split(np.mean(courses, axis=0), TENTHS)]
    cut = [{"experts": course[round(CUT * len(course)) - 1]} for course in courses]
    leads = {name: lead(found, name, EVOLVED) for name in (BASE, SWITCH, LONGER, GATE)}
    figures = table(found) | {"minus_evolved": leads, "experts_by_tenth": tenths, "before_the_cut": means(cut)}
    figures["longer_steps"] = [as_dear(arms()[SWITCH], course).options.steps for course in courses]
    return Outcome(shown=holds(leads, tenths), figures=figures, setting=setting(arms()))


def holds(leads: Mapping[str, Mapping[str, float]], tenths: Sequence[float]) -> bool:
    """The rule of the module's docstring."""
    falling = all(later <= earlier for earlier, later in pairwise(tenths[1:]))
    return all(leads[name]["low"] > 0 for name in (SWITCH, LONGER)) and falling and tenths[-1] == 1
