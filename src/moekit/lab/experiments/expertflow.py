"""ExpertFlow (n 72): does a network on the tokens know the experts, and do its forecasts save reads and experts?

Setting: the embedded model. Predictors learn from 12 calibration texts of 192 tokens per domain and seed (the network:
600 steps of 16 windows) and are judged on held-out texts, three per domain, decoding. Recall@4 is the share of a
token's four experts among the first four predicted before the token's first layer. Caches hold 25 % of all experts;
forecasts of four experts per layer are read ahead, at most four per layer's time, and kept; experts that arrive that
way are no demand misses but their bytes are counted. Regrouping: twelve held-out sequences, four per domain of three,
decode side by side in two batches of six, regrouped at every sixteenth position by what the network predicts.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of three differences lie
above zero: recall@4 of the network minus that of a table of token ids; demand misses per token with the frequency
prior's forecasts minus those with the network's; experts per layer needed by both batches split at random minus
regrouped. A network that does not beat the table, or a prior that saves as many misses, falsifies the claim. LRU,
Belady, the oracle, the split by true paths and the exhaustive best split are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._caching import LENGTH, Reader, capacity, gap
from moekit.lab.experiments._seeds import over_seeds
from moekit.profile import RoutingTrace
from moekit.run._batches import balanced_split, best_split, union_size
from moekit.run._predictors_path import PathNet, PathPredictor, probabilities, train_path
from moekit.run._predictors_seen import Frequency, Oracle, PreviousToken, TokenTable, usage
from moekit.run.expertflow import Foreseeing, Foresight
from moekit.run.policy import policy
from moekit.run.predict import Predictor, Signal
from moekit.run.replay import Counters, bound, replay

TEXTS, STEPS, SHARE, DEPTH, EVERY = 12, 600, 0.25, 4, 16


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return recall by predictor, misses and reads by cache, experts by split, and the rule's gaps."""
    reader, found = Reader(), []
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        seen = reader.trace("calibration", seed, TEXTS)
        net = train_path(seen, steps=STEPS, seed=seed)
        found.append(measure(net, seen, reader.trace("test", seed), seed))
        found[-1]["experts per layer"] = splits(net, reader.trace("test", seed + 1000, 4), seed)
    figures = summary(found)
    setting = {**reader.setting, "learned from": f"{TEXTS} texts per domain", "share": SHARE, "depth": DEPTH}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    recall, misses = [one["recall@4"] for one in found], [one["misses per token"] for one in found]
    needed = [one["experts per layer"] for one in found]
    rule = {
        "recall over table": gap([r["network"] for r in recall], [r["token table"] for r in recall]),
        "misses under prior": gap([m["frequency"] for m in misses], [m["network"] for m in misses]),
        "experts under random": gap([n["random"] for n in needed], [n["predicted"] for n in needed]),
    }
    return {**over_seeds(found), "rule": rule}


def measure(net: PathNet, seen: RoutingTrace, held: RoutingTrace, seed: int) -> dict[str, Any]:
    """Recall and caches of one seed."""
    layers, experts = held.num_layers, held.num_experts
    predictors: dict[str, Predictor] = {
        "network": PathPredictor(net, experts),
        "token table": TokenTable(seen),
        "frequency": Frequency.of_trace(seen),
        "previous token": PreviousToken(layers),
        "oracle": Oracle(held.requests, layers),
    }
    found = {name: recall(one, held) for name, one in predictors.items()}
    room = capacity(held, SHARE)
    caches: dict[str, Counters] = {"lru": replay(held, policy("lru"), room, phase="decode")}
    predictors |= {"oracle": Oracle(held.requests, layers), "frequency": Frequency.of_trace(seen)}
    for name, one in predictors.items():
        foresight = Foresight()
        ahead = Foreseeing(one, foresight, layers, DEPTH)
        caches[name] = replay(held, foresight, room, ahead, width=DEPTH, depth=DEPTH, phase="decode")
    caches["belady"] = bound(held, room, phase="decode")
    return {
        "recall@4": found,
        "misses per token": {name: c.misses / c.tokens for name, c in caches.items()},
        "read per token": {name: c.bytes / c.tokens for name, c in caches.items()},
    }


def recall(predictor: Predictor, trace: RoutingTrace) -> float:
    """Recall@4 of the decoded tokens, forecast before their first layer."""
    assert trace.token is not None
    found = asked = sequence = 0
    rankings: list[Any] = []
    predictor.reset()
    for request in trace.requests:
        own = slice(request.start, request.stop)
        if request.layer == 0:
            if trace.sequence[request.start] != sequence:
                predictor.reset()
                sequence = int(trace.sequence[request.start])
            signal = Signal(token=trace.token[own], sequence=trace.sequence[own])
            rankings = predictor.predict(-1, signal, trace.num_layers)
        if trace.decode[request.start]:
            found += len({e for e, _ in rankings[request.layer][:DEPTH]} & set(request.experts))
            asked += len(request.experts)
        predictor.observe(request.layer, request.experts)
    return found / asked


def splits(net: PathNet, trace: RoutingTrace, seed: int) -> dict[str, float]:
    """Experts that two batches of six need in a layer, mean over positions, by how the twelve were split."""
    draw = np.random.default_rng(seed)
    three = trace.take(np.flatnonzero(trace.domain < 3))
    rows = [np.flatnonzero(three.sequence == sequence) for sequence in np.unique(three.sequence)]
    order = draw.permutation(len(rows))  # as requests arrive: domains mixed
    path_NSLE = np.stack([usage(three)[rows[i]] > 0 for i in order])
    assert three.token is not None
    guess_NSLE = np.stack([forecast(net, three.token[rows[i]], DEPTH) for i in order])
    half = len(rows) // 2
    found: dict[str, list[float]] = {name: [] for name in ("as they came", "random", "predicted", "true paths", "best")}
    for at in range(EVERY, LENGTH, EVERY):
        mixed = draw.permutation(len(rows))
        ways: dict[str, tuple[Sequence[int], Sequence[int]]] = {
            "as they came": (range(half), range(half, len(rows))),
            "random": (mixed[:half].tolist(), mixed[half:].tolist()),
            "predicted": balanced_split(guess_NSLE[:, at]),
            "true paths": balanced_split(path_NSLE[:, at]),
            "best": best_split(path_NSLE[:, at]),
        }
        for name, halves in ways.items():
            found[name].append(sum(union_size(path_NSLE[:, at], h) for h in halves) / three.num_layers)
    return {name: float(np.mean(values)) for name, values in found.items()}


def forecast(net: PathNet, token_S: np.ndarray, depth: int) -> np.ndarray:
    """Bool [S, L, E]: the first ``depth`` experts predicted at each position."""
    share_SLE = probabilities(net, token_S, len(token_S))
    first = np.argsort(-share_SLE, axis=2, kind="stable")[..., :depth]
    chosen = np.zeros(share_SLE.shape, bool)
    np.put_along_axis(chosen, first, True, axis=2)
    return chosen
