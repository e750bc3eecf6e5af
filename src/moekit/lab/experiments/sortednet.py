"""SortedNet (n 33): is every prefix of the experts a usable model, and does the whole stay as good?

Setting: the protocol of ``_league``. Contestants: the base recipe; ``sorted``, the recipe: at every step the first 4,
6, .. or all 16 experts are the candidates; ``4``, ``8`` and ``12``, the base recipe with so many experts, trained for
that size alone. Judged further at every trained size m below 16: ``sorted`` with its first m experts, the base with
the m that its layers use most on training text.

Rule, written before the first run. `shown` if and only if all of these hold:

1. means over seeds of ``sorted`` never rise from a size to the next larger one;
2. at every size below 16 the 95 % t interval of (base, cut minus sorted) in bits per byte lies above zero;
3. the mean of ``sorted`` at 16 is at most 4 % above the base's.

How far the prefixes are from models trained for their size alone is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from moekit import lab
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import BASE, DOMAINS, column, contestant, setting, table
from moekit.lab.experiments._probing import bits, league, probes
from moekit.nn import MoE
from moekit.nn.elastic import restricted
from moekit.train.recipe import Recipe

KEY, SORTED = "sortednet", "sorted"
SIZES, ALONE, ALL, WORSE = (4, 6, 8, 10, 12, 14), (4, 8, 12), 16, 1.04


def arms() -> dict[str, Recipe]:
    """The contestants."""
    return {BASE: contestant(), SORTED: contestant(KEY)} | {str(m): contestant(num_experts=m) for m in ALONE}


def prefixes(model: Any, seed: int) -> dict[str, float]:
    """Bits per byte with the first m experts of every layer."""
    found = {}
    for size in SIZES:
        with restricted(model, experts=size):
            found[f"at {size}"] = bits(model, seed)
    return found | {f"at {ALL}": bits(model, seed)}


def whole(model: Any, seed: int) -> dict[str, float]:
    """Bits per byte of all there is, on the rows that parts are judged on."""
    return {"whole": bits(model, seed)}


def most_used(model: Any, seed: int) -> dict[str, float]:
    """Bits per byte with the m experts that each layer uses most on training text."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    texts = [lab.text(domain, "train", 4096, seed).encode()[:4096] for domain in DOMAINS]
    rows = torch.tensor([list(text) for text in texts]).view(-1, 128)
    with torch.no_grad():
        loads = model(input_ids=rows, use_cache=False).expert_load
    found = {}
    for size in SIZES:
        for layer, load in zip(layers, loads, strict=True):
            layer.gate.pool = torch.zeros(ALL, dtype=torch.bool).scatter(0, load.topk(size).indices, True)
        found[f"at {size}"] = bits(model, seed)
    for layer in layers:
        layer.gate.pool = None
    return found | {f"at {ALL}": bits(model, seed)}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses at every size, and the differences. ``text`` is not used."""
    probe = {BASE: most_used, SORTED: prefixes} | dict.fromkeys(map(str, ALONE), whole)
    found = league(arms(), seeds, advance, "sizes", probe)
    at = probes(found)
    cut = {f"at {m}": gap(at, f"{BASE} at {m}", f"{SORTED} at {m}") for m in SIZES}
    ratio = float(np.mean([one[SORTED] / one[BASE] for one in column(found, "bits_per_byte")]))
    course = [float(np.mean([one[f"{SORTED} at {m}"] for one in at])) for m in (*SIZES, ALL)]
    small = {f"at {m}": gap(at, f"{SORTED} at {m}", f"{m} whole") for m in ALONE}
    figures = table(found) | {"sizes": means(at), "cut_minus_sorted": cut, "sorted_minus_alone": small}
    figures |= {"sorted_over_base": ratio}
    return Outcome(shown=holds(course, cut, ratio), figures=figures, setting=setting(arms()))


def holds(course: Sequence[float], cut: Mapping[str, Mapping[str, float]], ratio: float) -> bool:
    """The rule of the module's docstring."""
    falling = all(later <= earlier for earlier, later in pairwise(course))
    return falling and all(one["low"] > 0 for one in cut.values()) and ratio <= WORSE
