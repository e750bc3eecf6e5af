"""HybriMoE (n 164): does caching by router scores hit more than LRU, and is the greedy split of a layer near the best?

Setting: the embedded model reads held-out texts of four domains, three of 192 tokens each per seed: 32 as one step,
the others one by one. Hit rates are those of decoding at 12.5 to 75 % of all experts, every policy with per-layer pools
but the multi-term one, which is global. Schedules (modelled, with the release's constants): the eight most wanted
experts of every prompt and layer with their token counts, and eight experts of one token each; 40 % of them cached,
drawn by the seed.
Control: the same with experts drawn at random for every token.

Rule. `shown` if and only if, with 95 % t intervals over seeds,

1. hit rate at 50 % of score-aware caching minus that of LRU lies above zero, and on the control it does not;
2. mean makespan of the better static mapping minus that of the greedy split lies above zero in decode, and the greedy
   split is not worse on prompts.

Score-aware at or below LRU, or a greedy split worse than the better static mapping, falsifies the claim. LFU, ARC,
Belady and the exhaustive optimum are reported beside.

The first version of this rule, written before its run on seeds 11 to 13, judged hit rates at 25 % and wanted a gain on
prompts too. Both were impossible here: at 25 % a layer's share is the four experts of one request, so that all
per-layer policies coincide (the difference was 0.0005), and with the release's constants moving everything is the
exhaustive optimum for prompts. At 50 % a share is two requests (2.7 to 3.8 in the paper's fine-grained models at 25 %).
That first run had a difference of 0.019 there; the rule as it stands is therefore judged on other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._caching import SHARES, Reader, gap, tried, uniform
from moekit.lab.experiments._seeds import each_seed, over_seeds
from moekit.profile import RoutingTrace
from moekit.run.hybrimoe import HybriMoE
from moekit.run.schedule import best_split, static_split

JUDGED, CACHED, EXPERTS = 0.5, 0.4, 8


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return hit rates by share, makespans by phase, and the rule's gaps. ``text`` is not used."""
    reader = Reader()
    found = each_seed(seeds, advance, lambda seed: measure(reader.trace("test", seed), seed))
    figures = summary(found)
    return Outcome(shown=holds(figures), figures=figures, setting={**reader.setting, "cached": CACHED})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    rule = figures["rule"]
    apart = rule["hits"]["low"] > 0 >= rule["control"]["low"]
    return apart and rule["decode"]["low"] > 0 and rule["prompts"]["mean"] >= 0


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rates = [one["hit rate"][str(JUDGED)] for one in found]
    control = [one["control"] for one in found]
    rule = {
        "hits": gap([r["score-aware"] for r in rates], [r["lru"] for r in rates]),
        "control": gap([r["score-aware"] for r in control], [r["lru"] for r in control]),
    }
    for phase in ("prompts", "decode"):
        spans = [one["makespan"][phase] for one in found]
        rule[phase] = gap([min(s["all fast"], s["as cached"]) for s in spans], [s["greedy"] for s in spans])
    return {**over_seeds(found), "rule": rule}


def measure(trace: RoutingTrace, seed: int) -> dict[str, Any]:
    """Figures of one seed."""
    rates = {str(s): {name: c.hit_rate for name, c in tried(trace, s).items()} for s in SHARES}
    control = {name: c.hit_rate for name, c in tried(uniform(trace, seed), JUDGED).items()}
    draw = np.random.default_rng(seed)
    prompts = [sorted(r.counts)[-EXPERTS:] for r in trace.requests if not trace.decode[r.start]]
    spans = {
        "prompts": makespans([one for one in prompts if len(one) == EXPERTS], draw),
        "decode": makespans([[1] * EXPERTS] * 50, draw),
    }
    return {"hit rate": rates, "control": control, "makespan": spans}


def makespans(loads: Sequence[Sequence[int]], draw: np.random.Generator) -> dict[str, float]:
    """Mean modelled makespan by mapping, and how far the greedy one is from the exhaustive optimum."""
    method, spans = HybriMoE(), []
    for tokens in loads:
        cached = (draw.random(len(tokens)) < CACHED).tolist()
        spans.append(
            {
                "greedy": method.schedule(tokens, cached).makespan,
                "best": best_split(tokens, cached, method.costs).makespan,
                "all fast": static_split(tokens, cached, method.costs, move=True).makespan,
                "as cached": static_split(tokens, cached, method.costs, move=False).makespan,
            }
        )
    ratios = [one["greedy"] / one["best"] for one in spans]
    means = {name: float(np.mean([one[name] for one in spans])) for name in spans[0]}
    return means | {"greedy over best": float(np.mean(ratios)), "worst over best": float(np.max(ratios))}
