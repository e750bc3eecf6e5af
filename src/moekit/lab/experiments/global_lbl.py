"""Global-batch load balancing (n 143): do experts specialise if only the whole batch must be balanced?

Setting: the league's model, steps and judge, but each step's batch is four micro-batches of four rows, twice the
league's bytes: of one domain each ("apart"), or each of all four ("mixed", the same rows dealt out otherwise). The load
loss (weight 0.01) counts within a micro-batch ("micro"), or over all four ("global"): they stand for four ranks that
exchange their counts, so that the first of them sees as much as the last. Specialisation: entropy of the routing given
the domain, in nats, mean over layers and domains, on the judge's text; the load of the whole is MaxVio there.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds lie above zero for: bits per
byte of micro minus global, apart; domain entropy of micro minus global, apart; and how much larger the difference in
domain entropy is apart than mixed. If mixed micro-batches show the same difference the claim is falsified: it would not
come from domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments import _league as league
from moekit.lab.experiments._outer_training import draws
from moekit.lab.experiments._seeds import interval, over_seeds
from moekit.nn.load import Load
from moekit.train import Batch, Batches, Record, train
from moekit.train.recipe import Recipe, Training

SCOPES = {"micro": "micro", "global": "accumulated"}
WAYS = ("apart", "mixed")


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return bits, loads and domain entropies of both scopes on both kinds of batches. ``text`` is not used."""
    arms = [(way, scope) for way in WAYS for scope in SCOPES]
    found: list[dict[str, dict[str, dict[str, float]]]] = []
    for number, seed in enumerate(seeds):
        played: dict[str, dict[str, dict[str, float]]] = {way: {} for way in WAYS}
        for place, (way, scope) in enumerate(arms):
            advance(number * len(arms) + place, len(seeds) * len(arms))
            played[way][scope] = play(contestant(scope), way, seed)
        found.append(played)
    figures = over_seeds(found)
    figures["rule"] = {
        "bits apart": interval([gap(one, "apart", "bits_per_byte") for one in found]),
        "entropy apart": interval([gap(one, "apart", "domain_entropy") for one in found]),
        "entropy apart over mixed": interval(
            [gap(one, "apart", "domain_entropy") - gap(one, "mixed", "domain_entropy") for one in found]
        ),
    }
    return Outcome(shown=holds(figures), figures=figures, setting=league.setting({"global": contestant("global")}))


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def contestant(scope: str) -> Recipe:
    recipe = league.contestant("global-lbl", balance={"load": {"weight": 0.01, "scope": SCOPES[scope]}})
    return replace(recipe.with_options(accumulate=1), batch=len(league.DOMAINS) ** 2)


def gap(one: Mapping[str, Any], way: str, figure: str) -> float:
    return one[way]["micro"][figure] - one[way]["global"][figure]


def play(recipe: Recipe, way: str, seed: int) -> dict[str, float]:
    """Train and judge one arm."""
    recipe = recipe.with_options(seed=seed)
    model = recipe.build()
    running, record = Training(model, recipe), Record()
    train(
        model,
        lambda model, batch: in_parts(running, model, batch),
        dealt(seed, recipe.batch * recipe.length, way),
        recipe.options,
        record=record,
        before_step=running.begin_step,
        after_step=running.end_step,
    )
    figures = league.judged(model.eval(), seed)
    return {name: figures[name] for name in ("bits_per_byte", "max_violation")} | {
        "domain_entropy": domain_entropy(model, seed)
    }


def dealt(seed: int, tokens: int, way: str) -> Batches:
    """Batches whose equal parts, as many as there are domains, are the micro-batches."""
    parts = len(league.DOMAINS)
    sources = [draws(seed + 101 * i, tokens // parts, {domain: 1.0}) for i, domain in enumerate(league.DOMAINS)]

    def batch(step: int) -> Batch:
        own = [source(step) for source in sources]
        whole = {name: torch.cat([one[name] for one in own]) for name in own[0]}
        if way == "mixed":
            order = torch.arange(len(whole["input_ids"])).view(parts, -1).T.flatten()
            whole = {name: rows[order] for name, rows in whole.items()}
        return whole

    return batch


def in_parts(running: Training, model: Any, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The mean loss of the micro-batches, where load terms of the wide scope know the counts of all of them."""
    count = len(league.DOMAINS)
    chunks = [rows.chunk(count) for rows in batch.values()]
    parts = [dict(zip(batch, each, strict=True)) for each in zip(*chunks, strict=True)]
    terms = [term for term in model.modules() if isinstance(term, Load) and term.scope == SCOPES["global"]]
    before = others(terms, running, model, parts)
    found = []
    for part, theirs in zip(parts, before, strict=True):
        for term, count_E in zip(terms, theirs, strict=True):
            term.count_E.copy_(count_E)
        found.append(running.loss(model, part))
    loss = torch.stack([value for value, _ in found]).mean()
    return loss, {name: torch.stack([said[name] for _, said in found]).mean() for name in found[0][1]}


@torch.no_grad()
def others(terms: Sequence[Load], running: Training, model: Any, parts: Sequence[Batch]) -> list[list[Tensor]]:
    """For each micro-batch what each term counts in the others [E], by a pass through all of them."""
    if not terms:
        return [[] for _ in parts]
    own = []
    for part in parts:
        running.loss(model, part)
        own.append([term.count_E.clone() for term in terms])
        for term in terms:
            term.finish_step()
    total = [torch.stack(counts).sum(0) for counts in zip(*own, strict=True)]
    return [[whole - count for whole, count in zip(total, counts, strict=True)] for counts in own]


@torch.no_grad()
def domain_entropy(model: Any, seed: int) -> float:
    """Entropy in nats of the experts' shares given the domain, mean over domains and layers."""
    values = []
    for domain in league.DOMAINS:
        load = model(input_ids=league.windows(domain, seed), use_cache=False).expert_load
        share = torch.stack([count.double() / count.sum() for count in load])
        values.append(float(torch.special.entr(share).sum(1).mean()))
    return sum(values) / len(values)
