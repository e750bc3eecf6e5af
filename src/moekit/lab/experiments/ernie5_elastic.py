"""ERNIE 5.0 (n 53): does elastic training leave smaller models inside the large one, at little cost to the whole?

Setting: the protocol of ``_league``. Contestants: the base recipe; ``elastic``, the recipe; ``plain``, the same model
and balance with no step taken smaller. Both of the latter are judged further as smaller models: 2 slots, 1 slot, 8
random experts, 1 and 2 random layers left out (means of 3 draws), and all at once (2 slots, 8 experts, 1 layer less).

Rule, written before the first run. `shown` if and only if

1. the 95 % t interval over seeds of (plain minus elastic) in what a smaller model loses against its whole, mean over
   the smaller models, lies above zero;
2. the mean of ``elastic`` whole is at most 2 % above that of ``plain``, in bits per byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import BASE, column, contestant, paper, setting, table
from moekit.lab.experiments._probing import bits, league, probes
from moekit.nn.elastic import restricted
from moekit.train.recipe import Recipe

KEY, ELASTIC, PLAIN = paper(__name__), "elastic", "plain"
SMALLER: dict[str, dict[str, int]] = {
    "2 slots": {"k": 2},
    "1 slot": {"k": 1},
    "8 experts": {"experts": 8},
    "1 layer less": {"without": 1},
    "2 layers less": {"without": 2},
    "all": {"k": 2, "experts": 8, "without": 1},
}
DRAWS, EXPERTS, LAYERS, WORSE = 3, 16, 6, 1.02


def arms() -> dict[str, Recipe]:
    """The contestants."""
    recipe = contestant(KEY)
    balanced = tuple(entry for entry in recipe.schedule if entry["set"].endswith("correction.rate"))
    return {BASE: contestant(), ELASTIC: recipe, PLAIN: replace(recipe, schedule=balanced)}


@contextmanager
def smaller(model: Any, seed: int, k: int | None = None, experts: int = 0, without: int = 0) -> Iterator[None]:
    """The model with so many slots, so many random experts, so many random layers left out."""
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        if experts:
            mask = torch.zeros(EXPERTS, dtype=torch.bool)
            mask[torch.randperm(EXPERTS, generator=generator)[:experts]] = True
            stack.enter_context(restricted(model, experts=mask))
        out = set(torch.randperm(LAYERS, generator=generator)[:without].tolist())
        stack.enter_context(restricted(model, k=k, layers=[layer not in out for layer in range(LAYERS)]))
        yield


def degradation(model: Any, seed: int) -> dict[str, float]:
    """By how much bits per byte rise in each smaller model, and the mean of that."""
    whole, found = bits(model, seed), {}
    for name, options in SMALLER.items():
        drawn = []
        for draw in range(DRAWS if set(options) != {"k"} else 1):
            with smaller(model, 100 * seed + draw, **options):
                drawn.append(bits(model, seed) - whole)
        found[name] = float(np.mean(drawn))
    return found | {"mean": float(np.mean(list(found.values())))}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses of the whole and what smaller models lose. ``text`` is not used."""
    found = league(arms(), seeds, advance, "smaller", dict.fromkeys((ELASTIC, PLAIN), degradation))
    rises = probes(found)
    gaps = {name: gap(rises, f"{PLAIN} {name}", f"{ELASTIC} {name}") for name in (*SMALLER, "mean")}
    ratio = float(np.mean([one[ELASTIC] / one[PLAIN] for one in column(found, "bits_per_byte")]))
    figures = table(found) | {"rise": means(rises), "plain_minus_elastic": gaps, "elastic_over_plain": ratio}
    return Outcome(shown=holds(gaps, ratio), figures=figures, setting=setting(arms()))


def holds(gaps: Mapping[str, Mapping[str, float]], ratio: float) -> bool:
    """The rule of the module's docstring."""
    return gaps["mean"]["low"] > 0 and ratio <= WORSE
