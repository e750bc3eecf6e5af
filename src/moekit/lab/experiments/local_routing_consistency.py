"""Local routing consistency (n 123): do SRP and SCH tell which layers can be cached?

Setting: the embedded model reads held-out texts of four domains, three of 192 tokens each per seed, token by token. A
cell is one layer on one domain (32 cells): SRP over windows of 16 tokens, and hit rates of a cache of its own of eight
experts, twice the four in use: SCH (window 16), LRU, LFU and Belady, all from an empty cache. Control: experts drawn at
random for every token, and the analytic SRP of such routing.

Rule, written before the first run. `shown` if and only if, with 95 % t intervals over seeds,

1. SCH minus LRU, mean over cells, lies above zero, and no cell has SCH above Belady;
2. the correlation over cells of SRP with LRU's hit rate, and of SCH with it, lies above 0.5;
3. SRP of the model, all counts pooled, minus that of the control lies above zero.

That balance losses lower SRP and that shared experts do is not tried: one trained model is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._caching import Reader, decoded, gap, one_layer, uniform
from moekit.lab.experiments._seeds import each_seed, interval, over_seeds
from moekit.profile import RoutingTrace
from moekit.run.local_routing_consistency import SegmentCache, srp, window_counts
from moekit.run.policy import policy
from moekit.run.replay import bound, replay

WINDOW, ROOM = 16, 2


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return SRP and hit rates over cells, their correlations, and the rule's figures. ``text`` is not used."""
    reader = Reader()
    found = each_seed(seeds, advance, lambda seed: measure(decoded(reader.trace("test", seed), prompt=1), seed))
    figures = summary(found)
    return Outcome(shown=holds(figures), figures=figures, setting={**reader.setting, "window": WINDOW, "prompt": 1})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    rule = figures["rule"]
    apart = all(rule[name]["low"] > 0 for name in ("sch over lru", "srp over control"))
    alike = all(rule[name]["low"] > 0.5 for name in ("srp with lru", "sch with lru"))
    return apart and alike and rule["cells above belady"] == 0


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cells = [one["cells"] for one in found]
    rule: dict[str, Any] = {
        "sch over lru": gap([np.mean(c["sch"]) for c in cells], [np.mean(c["lru"]) for c in cells]),
        "srp over control": gap([one["srp"]["model"] for one in found], [one["srp"]["control"] for one in found]),
    }
    for name in ("srp", "sch"):
        rule[f"{name} with lru"] = interval([float(np.corrcoef(c[name], c["lru"])[0, 1]) for c in cells])
    above = [s > b for c in cells for s, b in zip(c["sch"], c["belady"], strict=True)]
    rule["cells above belady"] = int(sum(above))
    means = [{name: float(np.mean(values)) for name, values in c.items()} for c in cells]
    kept = [{name: value for name, value in one.items() if name != "cells"} for one in found]
    return {**over_seeds(kept), "mean over cells": over_seeds(means), "rule": rule}


def measure(trace: RoutingTrace, seed: int) -> dict[str, Any]:
    """Figures of one seed; ``cells`` are lists by domain and layer."""
    cells: dict[str, list[float]] = {name: [] for name in ("srp", "sch", "lru", "lfu", "belady")}
    for domain in trace.domains:
        for layer in range(trace.num_layers):
            for name, value in cell(one_layer(trace.of_domain(domain), layer)).items():
                cells[name].append(value)
    control = uniform(trace, seed)
    layers = {str(i): srp(window_counts(one_layer(trace, i), WINDOW), WINDOW).srp for i in range(trace.num_layers)}
    pooled = srp(window_counts(trace, WINDOW), WINDOW)
    names = {
        "model": pooled.srp,
        "control": srp(window_counts(control, WINDOW), WINDOW).srp,
        "analytic": analytic(trace),
    }
    return {"srp": names, "srp by layer": layers, "size ratio": pooled.size, "cells": cells}


def cell(trace: RoutingTrace) -> dict[str, float]:
    """SRP and hit rates of one layer."""
    room = ROOM * trace.expert.shape[2]
    caches = {
        "sch": SegmentCache(trace=trace, window=WINDOW),
        "lru": policy("lru:pool=global"),
        "lfu": policy("lfu:pool=global"),
    }
    rates = {name: replay(trace, cache, room).hit_rate for name, cache in caches.items()}
    return {"srp": srp(window_counts(trace, WINDOW), WINDOW).srp, **rates, "belady": bound(trace, room).hit_rate}


def analytic(trace: RoutingTrace) -> float:
    """SRP of experts drawn alike: counts are binomial."""
    slots, experts = trace.expert.shape[2], max(trace.num_experts)
    count = np.arange(WINDOW + 1)
    share = binom.pmf(count, WINDOW, slots / experts)
    total = WINDOW * slots / experts
    scores = [2 * (count * share)[a:].sum() / (WINDOW * share[a:].sum() + total) for a in range(1, WINDOW + 1)]
    return float(max(scores))
