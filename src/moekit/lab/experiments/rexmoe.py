"""ReXMoE (n 13): does choosing from the experts of neighbouring layers help, and only with growing candidates?

Setting: the protocol of ``_league``, 16 experts a layer of which 4 are chosen. Contestants: the base recipe; ``own``,
the recipe with a bank for each layer; ``two`` and ``three`` layers to a bank with candidates growing from 16 to all
between 20 % and 60 % of the run (``three`` is the recipe); ``two, all`` and ``three, all``, all of them candidates
from the start.

Rule, written before the first run. `shown` if and only if

1. the 95 % t intervals over seeds of (own minus three), (base minus three) and (three, all minus three) in bits per
   byte lie above zero;
2. growing gains more than reuse alone: mean of (three, all minus three) > mean of (own minus three, all).

MaxVio is reported: the paper finds large banks badly balanced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table
from moekit.train.recipe import Recipe

KEY, OWN, TWO, THREE, TWO_ALL, THREE_ALL = "rexmoe", "own", "two", "three", "two, all", "three, all"


def arms() -> dict[str, Recipe]:
    """The contestants."""
    recipe = contestant(KEY)
    (entry,) = recipe.schedule
    halves = {**entry, "course": {**entry["course"], "own": 0.5}}
    return {
        BASE: contestant(),
        OWN: replace(contestant(KEY, layers_per_bank=1), schedule=()),
        TWO: replace(contestant(KEY, layers_per_bank=2), schedule=(halves,)),
        TWO_ALL: replace(contestant(KEY, layers_per_bank=2), schedule=()),
        THREE: recipe,
        THREE_ALL: replace(recipe, schedule=()),
    }


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters and balance, and the differences. ``text`` is not used."""
    found = league(arms(), seeds, advance)
    pairs = [(OWN, THREE), (BASE, THREE), (THREE_ALL, THREE), (OWN, THREE_ALL)]
    pairs += [(OWN, TWO), (TWO_ALL, TWO), (OWN, TWO_ALL)]
    gaps = {f"{worse} - {better}": lead(found, worse, better) for worse, better in pairs}
    return Outcome(shown=holds(gaps), figures=table(found) | {"gap": gaps}, setting=setting(arms()))


def holds(gaps: Mapping[str, Mapping[str, Any]]) -> bool:
    """The rule of the module's docstring."""
    ahead = all(gaps[f"{worse} - {THREE}"]["low"] > 0 for worse in (OWN, BASE, THREE_ALL))
    return ahead and gaps[f"{THREE_ALL} - {THREE}"]["mean"] > gaps[f"{OWN} - {THREE_ALL}"]["mean"]
