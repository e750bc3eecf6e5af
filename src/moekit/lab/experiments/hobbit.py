"""HOBBIT (n 128): does reading unimportant missing experts at low precision lose less than doing so at random?

Setting: the embedded model reads held-out texts of four domains, one of 192 tokens each per seed, as if token by
token. Each layer has four places for experts as they are (25 %) and two for copies in 4 bits (groups of 64), both LRU;
an expert that is missing is read at the precision that the thresholds T1 0.6, T2 0.9 give it, or left out. Loss is the
KL divergence from the resident model; bytes are those read. Contestants: everything read as it is (KL 0), T2 = 1 (low
but never left out), the whole method, all that is missing at 4 bits, T1 = T2 (left out or whole), and at random: every
missing slot gets a level drawn with the frequencies that the method (or its T2 = 1) had in that layer.

Caches: decode through 25 % of all experts, a miss costing 1 where the thresholds ask for full precision, the share of
bytes where they ask for 4 bits, and nothing where the expert is left out; every miss is kept. The four terms' weights
are tuned on calibration text; single terms, LRU per layer and the offline optimum (a minimum-cost flow) are beside.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of three differences lie
above zero: KL of the random choice minus that of the thresholds, for T2 = 1 and for the whole method, the random choice
reading at least 98 % of their bytes on average; and penalty of frequency alone minus that of the tuned mixture. A
random choice with the same loss at the same bytes falsifies the claim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.bank import ExpertBank
from moekit.blocks.rewriting import attach
from moekit.formats import DenseBank, PackedBank
from moekit.kernels.rewrites import Routed
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._caching import Reader, capacity, gap
from moekit.lab.experiments._routing import _Tried
from moekit.lab.experiments._seeds import over_seeds
from moekit.profile import RoutingTrace
from moekit.profile.trace import Request
from moekit.run._weighted_bound import least_penalty
from moekit.run.hobbit import HIGH, LOW, SKIP, TERMS, Hobbit
from moekit.run.policy import CachePolicy, Key, policy
from moekit.run.replay import replay

TEXTS, PLACES, LOW_PLACES, BITS, GROUP, SHARE = 1, 4, 2, 4, 64, 0.25
LOW_COST = (BITS + 16 / GROUP) / 16
COST = {HIGH: 1.0, LOW: LOW_COST, SKIP: 0.0}
Level = Callable[[np.ndarray], np.ndarray]
"""A token's weights [1, K] -> what each expert is read at if it is missing."""


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return loss and bytes by contestant, penalties by cache, and the rule's gaps. ``text`` is not used."""
    reader, found = Reader(), []
    banks = {block.name: both_precisions(block.bank()) for block in reader.blocks}
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        losses = contestants(reader, banks, seed)
        caches = penalties(reader.trace("calibration", seed, TEXTS), reader.trace("test", seed, TEXTS))
        found.append({**losses, "penalty per token": caches})
    figures = summary(found)
    return Outcome(
        shown=holds(figures),
        figures=figures,
        setting={**reader.setting, "texts per domain": TEXTS, "bits": BITS, "places": PLACES},
    )


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    read = figures["bytes per token, in experts"]
    fair = all(read[f"random, {name}"]["mean"] >= 0.98 * read[name]["mean"] for name in ("low", "method"))
    return fair and all(one["low"] > 0 for one in figures["rule"].values())


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kl, cost = [one["kl"] for one in found], [one["penalty per token"] for one in found]
    rule = {f"kl, {name}": gap([k[f"random, {name}"] for k in kl], [k[name] for k in kl]) for name in ("low", "method")}
    rule["penalty"] = gap([c["frequency"] for c in cost], [c["tuned"] for c in cost])
    return {**over_seeds(found), "rule": rule}


# -- what low precision costs


class Paged(_Tried):
    """A layer whose missing experts come at a level: tokens one after the other, two pools of least recent use."""

    def __init__(self, experts: int, level: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.experts, self.level = experts, level
        self.pools = {HIGH: dict[int, None](), LOW: dict[int, None]()}
        self.room = {HIGH: PLACES, LOW: LOW_PLACES}
        self.levels: list[int] = []  # of every missing slot
        self.read = 0.0
        self.tokens = 0

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Routed:
        expert_TK, weight = index_TK.cpu().numpy(), weight_TK.float().cpu().numpy()
        served = np.array([self._token(e, w) for e, w in zip(expert_TK, weight, strict=True)])
        self.tokens += len(served)
        index = torch.from_numpy(np.where(served == LOW, expert_TK + self.experts, expert_TK))
        gone = torch.from_numpy(served == SKIP)
        return x_TH, index.masked_fill(gone, -1), weight_TK.masked_fill(gone, 0.0)

    def _token(self, expert_K: np.ndarray, weight_K: np.ndarray) -> list[int]:
        """The precision each of a token's experts is computed at."""
        wanted_K, found = self.level(weight_K[None])[0], []
        for expert, wanted in zip(expert_K.tolist(), wanted_K.tolist(), strict=True):
            there = next((level for level in (HIGH, LOW) if expert in self.pools[level] and level >= wanted), None)
            if there is None:
                self.levels.append(wanted)
                self.read += COST[wanted]
                there = wanted
            found.append(there)
            if there == SKIP:
                continue
            pool = self.pools[there]
            pool.pop(expert, None)
            pool[expert] = None
            own = expert_K.tolist()
            if len(pool) > self.room[there]:
                del pool[next((e for e in pool if e not in own), next(iter(pool)))]
        return found


def both_precisions(bank: ExpertBank) -> PackedBank:
    """Experts as they are, then all of them in :data:`BITS` bits."""
    assert isinstance(bank, DenseBank)
    count = bank.num_experts
    return PackedBank.quantise(bank.select([*range(count), *range(count)]), [16] * count + [BITS] * count, GROUP)


def contestants(reader: Reader, banks: Mapping[str, ExpertBank], seed: int) -> dict[str, Any]:
    """KL and bytes read per token (in experts, all layers) by contestant, and what the levels were."""
    rows = [row for own in reader.rows("test", seed, TEXTS).values() for row in own]
    plain = log_probabilities(reader, rows)
    every: dict[str, Callable[[int], Level]] = {
        "whole": lambda layer: Hobbit(high=1.0, low=1.0).precision,
        "low": lambda layer: Hobbit(low=1.0).precision,
        "method": lambda layer: Hobbit().precision,
        "all at low": lambda layer: lambda weight_TK: np.full(weight_TK.shape, LOW),
        "whole or nothing": lambda layer: Hobbit(high=0.9, low=0.9).precision,
    }
    found: dict[str, Any] = {"kl": {}, "bytes per token, in experts": {}, "levels of misses": {}}
    for name, level in every.items():
        paged = attempt(reader, banks, rows, plain, level, name, found)
        if name in ("low", "method"):
            attempt(reader, banks, rows, plain, drawn([one.levels for one in paged], seed), f"random, {name}", found)
    return found


def attempt(
    reader: Reader,
    banks: Mapping[str, ExpertBank],
    rows: Sequence[Tensor],
    plain: Sequence[Tensor],
    level: Callable[[int], Level],
    name: str,
    found: dict[str, Any],
) -> list[Paged]:
    """Run one contestant and note its figures under ``name``."""
    paged = [Paged(block.num_experts, level(layer)) for layer, block in enumerate(reader.blocks)]
    with ExitStack() as stack:
        for one, block in zip(paged, reader.blocks, strict=True):
            stack.callback(attach(one, block, None, banks[block.name]).remove)
        now = log_probabilities(reader, rows)
    kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(plain, now, strict=True)]
    found["kl"][name] = float(torch.stack(kl).mean())
    found["bytes per token, in experts"][name] = sum(one.read for one in paged) / paged[0].tokens
    levels = np.concatenate([one.levels for one in paged])
    found["levels of misses"][name] = {
        word: float((levels == which).mean()) for word, which in (("high", HIGH), ("low", LOW), ("skipped", SKIP))
    }
    return paged


def drawn(levels: Sequence[Sequence[int]], seed: int) -> Callable[[int], Level]:
    """Levels drawn for every slot with the frequencies that missing slots of the layer had."""

    def of(layer: int) -> Level:
        draw, had = np.random.default_rng((seed, layer)), np.asarray(levels[layer])
        return lambda weight_TK: draw.choice(had, weight_TK.shape)

    return of


@torch.no_grad()
def log_probabilities(reader: Reader, rows: Sequence[Tensor]) -> list[Tensor]:
    return [reader.model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1) for row in rows]


# -- what misses cost


def penalties(seen: RoutingTrace, held: RoutingTrace) -> dict[str, float]:
    """Penalty per token on held-out text, by policy, and the offline optimum."""
    tuned = Hobbit().tuned(lambda one: penalty(one, seen))
    every: dict[str, CachePolicy] = {
        "lru per layer": policy("lru"),
        **{term: replace(Hobbit(), **{other: float(other == term) for other in TERMS}).policy() for term in TERMS},
        "equal": Hobbit().policy(),
        "tuned": tuned.policy(),
    }
    price = prices(held)
    least = least_penalty(held.requests, lambda at, key: price[at][key[1]], capacity(held, SHARE))
    found = {name: penalty(one, held) for name, one in every.items()} | {"optimum": least / len(held)}
    return found | {f"weight of {term}": getattr(tuned, term) for term in TERMS}


def penalty(cache: CachePolicy, trace: RoutingTrace) -> float:
    """What misses cost per token."""
    price = dict(zip(map(id, trace.requests), prices(trace), strict=True))
    cost = 0.0

    def missed(request: Request, keys: Sequence[Key]) -> None:
        nonlocal cost
        cost += sum(price[id(request)][expert] for _, expert in keys)

    replay(trace, cache, capacity(trace, SHARE), missed=missed)
    return cost / len(trace)


def prices(trace: RoutingTrace) -> list[dict[int, float]]:
    """By request and expert, what a miss costs under the default thresholds."""
    found = []
    for request in trace.requests:
        own = slice(request.start, request.stop), request.layer
        levels = Hobbit().read(trace.expert[own], trace.weight[own])
        found.append({expert: COST[level] for expert, level in levels.items()})
    return found
