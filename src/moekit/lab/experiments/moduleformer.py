"""ModuleFormer (n 59): surer routers at equal balance by mutual information, and experts to spare after concentration?

Setting: the protocol of ``_league``. Contestants, alike but for their balance terms: ``information``, the recipe
(mutual information 0.01 in feed-forward and attention), ``load`` (the load loss 0.01 in both); the base recipe for the
scale. Then ``information`` is tuned on one domain (c), 100 steps at 1e-3: without any term, and with the entropy of the
experts' mean use times 0.1 (``concentrated``). Half of each layer's feed-forward experts, the least used ones on other
text of that domain, are no candidates any more, and the domain's bits per byte are taken.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds say: entropy per token of the
routers of ``load`` minus that of ``information`` lies above zero, while its MaxVio is not larger by more than 0.2 on
average; and at half of the experts, plainly tuned minus concentrated in bits per byte lies above zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import ELSEWHERE, gap, means
from moekit.lab.experiments._league import BASE, contestant, lead, setting, table, windows
from moekit.lab.experiments._outer_training import draws
from moekit.lab.experiments._probing import league, per_byte, probes
from moekit.nn import MoE
from moekit.train.recipe import Recipe, carry_out

KEY, INFORMATION, LOAD, DOMAIN, STEPS, RATE, WEIGHT = "moduleformer", "information", "load", "c", 100, 1e-3, 0.1
BALANCED = ("mlp.weight_of.mutual-information", "self_attn.router.weight_of.attention-mutual-information")
"""Terms that are left out when tuning."""


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by contestant, entropies, and losses at half of the experts. ``text`` is not used."""
    recipe = contestant(KEY, balance={"concentration": 0})
    attention = {**recipe.model["attention"], "balance": {"load": 0.01}}
    balance = {"load": 0.01, "mutual-information": 0, "concentration": 0}
    arms = {BASE: contestant(), INFORMATION: recipe, LOAD: contestant(KEY, attention=attention, balance=balance)}
    looks = {INFORMATION: partial(spared, recipe), LOAD: entropies}
    found = league(arms, seeds, advance, "modules", looks)
    seen = probes(found)
    figures = table(found) | {
        "probes": means(seen),
        "load - information, entropy": gap(seen, f"{LOAD} entropy", f"{INFORMATION} entropy"),
        "load - information, bits": lead(found, LOAD, INFORMATION),
        "plain - concentrated, half": gap(seen, f"{INFORMATION} plain, half", f"{INFORMATION} concentrated, half"),
    }
    return Outcome(shown=holds(figures), figures=figures, setting=setting(arms))


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    violation = figures["max_violation"]
    return (
        figures["load - information, entropy"]["low"] > 0
        and violation[INFORMATION]["mean"] - violation[LOAD]["mean"] <= 0.2
        and figures["plain - concentrated, half"]["low"] > 0
    )


def layers(model: Any) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@torch.no_grad()
def entropies(model: Any, seed: int) -> dict[str, float]:
    """Mean entropy in nats of what the feed-forward routers say of a token."""
    found: list[float] = []

    def listen(gate: Any, args: Sequence[Any], out: Sequence[Tensor]) -> None:
        found.append(torch.distributions.Categorical(logits=out[0].float()).entropy().mean().item())

    hooks = [layer.gate.register_forward_hook(listen) for layer in layers(model)]
    model(input_ids=windows(DOMAIN, seed)[:32], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {"entropy": float(np.mean(found))}


def spared(recipe: Recipe, model: Any, seed: int) -> dict[str, float]:
    """Entropies, and bits per byte of the domain after tuning, with all experts and with half of them."""
    found = entropies(model, seed)
    for name, weight in (("plain", 0.0), ("concentrated", WEIGHT)):
        tuned = copy.deepcopy(model)
        terms = {"mlp.weight_of.concentration": weight} | dict.fromkeys(BALANCED, 0.0)
        held = tuple(
            {"set": f"model.layers.*.{term}", "course": {"kind": "steps", "values": [value], "at": []}}
            for term, value in terms.items()
        )
        batches = draws(seed + ELSEWHERE, recipe.batch * recipe.length, {DOMAIN: 1.0})
        tuning = replace(recipe.with_options(steps=STEPS, learning_rate=RATE, seed=seed), schedule=held)
        carry_out(tuning, batches, tuned)
        found[f"{name}, all"] = per_byte(tuned.eval(), windows(DOMAIN, seed))
        halve(tuned, seed)
        found[f"{name}, half"] = per_byte(tuned, windows(DOMAIN, seed))
    return found


@torch.no_grad()
def halve(model: Any, seed: int) -> None:
    """Leave each router the more used half of its experts, in place."""
    used = model(input_ids=windows(DOMAIN, seed + ELSEWHERE)[:64], use_cache=False).expert_load
    for layer, count in zip(layers(model), used, strict=True):
        pool = torch.zeros(len(count), dtype=torch.bool)
        pool[count.topk(len(count) // 2).indices] = True
        layer.gate.pool = pool
