"""Fate (n 148): does the next gate on this gate's input know the next experts, and do shallow quotas help?

Setting: the embedded model; texts of the calibration split to learn from (frequencies, tables, trained pre-gates,
accuracy by layer), held-out texts of the test split to judge on, three of 192 tokens per domain and seed, decoding.
Recall@n is the share of a token's four experts among the first n predicted. Caches hold 50 % of all experts; half as
many do not hold one whole layer and a request of each other one. Prefetches read at most four experts ahead per layer
out of the first six predicted. The quota rule caches the layers whole that come before the first one predicted at
least as well as the mean layer on calibration text; layer 0, which nothing comes before, counts as never predicted.
The alternative gives each layer a share by what prediction misses there.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of four differences lie above
zero: recall@4, mean over layers 1 on, of the next gate minus that of the calibration frequency, and minus that of the
previous token; hit rate of ARC with the quotas minus ARC with equal shares, both with the next gate's prefetches; and
the rank correlation of a layer's recall with its depth. If recall does not rise with depth, the quota rule has no
ground here and should lose to shares by what is missed: that is reported, with Belady under the same quotas and free.
Prefill orders are modelled: transfer and compute of equal mean, popular experts first against Johnson's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._caching import Reader, capacity, gap
from moekit.lab.experiments._seeds import each_seed, interval, over_seeds
from moekit.profile import RoutingTrace
from moekit.run._policies_arc import ARC
from moekit.run._policies_known import Belady, demand
from moekit.run._policies_pools import LayerPools
from moekit.run._predictors_gate import Gate, NextGate, fit_gates
from moekit.run._predictors_seen import TokenTable, usage
from moekit.run.fate import Fate, boundary, prefill_order, proportional
from moekit.run.policy import CachePolicy, policy
from moekit.run.replay import Counters, bound, replay
from moekit.run.schedule import flow_shop, johnson

SHARE, WIDTH, DEPTH, RANKS = 0.5, 4, 6, (4, 6, 8)


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return recall by predictor and layer, hit rates by cache, and the rule's gaps. ``text`` is not used."""
    reader = Reader()
    found = each_seed(seeds, advance, lambda seed: measure(reader, seed))
    figures = summary(found)
    return Outcome(shown=holds(figures), figures=figures, setting={**reader.setting, "share": SHARE, "width": WIDTH})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    recall = [one["recall@4"] for one in found]
    hits = [one["hit rate"] for one in found]
    rule = {
        f"recall over {name}": gap([r["next gate"] for r in recall], [r[name] for r in recall])
        for name in ("frequency", "previous token")
    }
    rule["quotas"] = gap([h["quotas, prefetch"] for h in hits], [h["arc, prefetch"] for h in hits])
    rule["depth"] = interval([one["recall by depth"] for one in found])
    return {**over_seeds(found), "rule": rule}


def measure(reader: Reader, seed: int) -> dict[str, Any]:
    """Figures of one seed."""
    seen, held = (reader.trace(split, seed, inputs=True) for split in ("calibration", "test"))
    gates: list[Gate] = [block.choose for block in reader.blocks]
    score = scores(reader, gates, seen, held)
    layers = by_layer(score["next gate"], held, 4)
    learned = by_layer(gate_scores(gates, seen), seen, 4)
    recalls = {f"recall@{n}": {name: mean_recall(one, held, n) for name, one in score.items()} for n in RANKS}
    return {
        **recalls,
        "next gate, by layer": {str(layer): layers[layer] for layer in range(1, held.num_layers)},
        "cosine with the input before": cosines(held),
        "recall by depth": float(spearmanr(range(1, held.num_layers), layers[1:]).statistic),
        **caches(NextGate(gates), held, [0.0, *learned[1:]]),
        "prefill over johnson": prefill(held),
    }


def scores(reader: Reader, gates: Sequence[Gate], seen: RoutingTrace, held: RoutingTrace) -> dict[str, np.ndarray]:
    """By predictor, [T, L, E]: what it thinks of each expert when a token stands one layer before."""
    table = TokenTable(seen)
    assert held.token is not None
    prior_LE = demand(seen)
    before_TLE = np.roll(usage(held), 1, axis=0)
    before_TLE[np.diff(held.sequence, prepend=-1) != 0] = 0
    return {
        "next gate": gate_scores(gates, held),
        "next gate, later norm": gate_scores(gates, held, norms(reader)),
        "pre-gate": gate_scores(fit_gates(seen), held),
        "token table": np.stack([table.table.get(int(token), table.mean_LE) for token in held.token]),
        "frequency": np.broadcast_to(prior_LE, (len(held), *prior_LE.shape)),
        "previous token": before_TLE + 1e-3 * prior_LE,
    }


def norms(reader: Reader) -> list[torch.Tensor]:
    """The weight of the norm before each router."""
    layers = reader.model.get_submodule("model.layers")
    return [layers[block.layer].post_attention_layernorm.weight for block in reader.blocks]


def gate_scores(gates: Sequence[Gate], trace: RoutingTrace, scales: Sequence[torch.Tensor] | None = None) -> np.ndarray:
    """[T, L, E] logits of each layer's gate on the input of the layer before; zeros at layer 0."""
    assert trace.inputs is not None
    found = np.zeros((len(trace), trace.num_layers, max(trace.num_experts)))
    for layer in range(1, trace.num_layers):
        x_TH = torch.from_numpy(trace.inputs[:, layer - 1]).float()
        if scales is not None:
            x_TH = x_TH * (scales[layer] / scales[layer - 1])
        with torch.no_grad():
            logits = gates[layer](x_TH).logits
        assert logits is not None
        found[:, layer] = logits.numpy()
    return found


def by_layer(score_TLE: np.ndarray, trace: RoutingTrace, n: int) -> list[float]:
    """Recall@n of the decoded tokens, by layer."""
    first = np.argsort(-score_TLE, axis=2, kind="stable")[..., :n]
    hit_TLE = np.take_along_axis(usage(trace), first, 2)[trace.decode]
    return (hit_TLE.sum(2).mean(0) / trace.expert.shape[2]).tolist()


def mean_recall(score_TLE: np.ndarray, trace: RoutingTrace, n: int) -> float:
    return float(np.mean(by_layer(score_TLE, trace, n)[1:]))


def cosines(trace: RoutingTrace) -> dict[str, float]:
    """Of what a layer's router reads with what the router before it read, mean over tokens, by layer."""
    assert trace.inputs is not None
    x_TLH = trace.inputs.astype(np.float32)
    x_TLH /= np.linalg.norm(x_TLH, axis=2, keepdims=True)
    each = (x_TLH[:, 1:] * x_TLH[:, :-1]).sum(2).mean(0)
    return {str(layer): float(cosine) for layer, cosine in enumerate(each, 1)}


def caches(gate: NextGate, trace: RoutingTrace, accuracy_L: Sequence[float]) -> dict[str, Any]:
    """Hit rates, prefetched bytes and the boundary of every cache at :data:`SHARE`."""
    room, experts = capacity(trace, SHARE), trace.num_experts
    edge = boundary(accuracy_L, experts, room, trace.expert.shape[2])
    method = Fate(boundary=edge)
    shares = proportional(accuracy_L, experts, room)

    def ahead(cache: CachePolicy) -> Counters:
        return replay(trace, cache, room, gate, width=WIDTH, depth=DEPTH, phase="decode")

    found = {
        "lru": replay(trace, policy("lru"), room, phase="decode"),
        "arc": replay(trace, policy("arc"), room, phase="decode"),
        "quotas": replay(trace, method.policy(experts, room), room, phase="decode"),
        "lru, prefetch": ahead(policy("lru")),
        "arc, prefetch": ahead(policy("arc")),
        "quotas, prefetch": ahead(method.policy(experts, room)),
        "shares by misses, prefetch": ahead(LayerPools(ARC(), shares)),
        "belady, quotas": replay(
            trace, LayerPools(Belady(trace.requests), method.quotas(experts, room)), room, phase="decode"
        ),
        "belady": bound(trace, room, phase="decode"),
    }
    return {
        "hit rate": {name: counters.hit_rate for name, counters in found.items()},
        "read per decoded token": {name: c.bytes / c.tokens for name, c in found.items()},
        "useless of prefetched": {
            name: c.useless_prefetch_bytes / c.prefetch_bytes for name, c in found.items() if c.prefetch_bytes
        },
        "boundary": float(edge),
    }


def prefill(trace: RoutingTrace) -> dict[str, float]:
    """Modelled makespan of every prompt and layer by order, as a multiple of Johnson's, with equal transfers."""
    found: dict[str, list[float]] = {"popular first": [], "by id": [], "popular last": []}
    for request in (r for r in trace.requests if not trace.decode[r.start]):
        tokens = request.counts
        transfer = [float(np.mean(tokens))] * len(tokens)
        least = flow_shop(johnson(transfer, tokens), transfer, tokens)
        order = prefill_order(tokens)
        for name, one in zip(found, (order, range(len(tokens)), order[::-1]), strict=True):
            found[name].append(flow_shop(one, transfer, tokens) / least)
    return {name: float(np.mean(ratios)) for name, ratios in found.items()}
