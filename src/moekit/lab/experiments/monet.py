"""Monet (n 54): as good as a dense model of its size, and does taking a domain's experts away harm that domain alone?

Setting: the protocol of ``_league``. Contestants: ``monet``, the recipe (32 x 32 experts a layer); ``dense``, plain
feed-forward layers, as many parameters in all; the base recipe for the scale. In the trained ``monet``, for each of the
four domains and in every layer, the 102 experts (a tenth) are switched off whose share of the domain's routing weight
is furthest above their share in any other domain, measured on text apart from the judge's; or 102 experts at random.

Selectivity: the rise of the domain's own bits per byte minus the mean rise of the others, mean over domains.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds say: monet minus dense in
bits per byte does not lie above zero or is at most 0.02 on average; selectivity of chosen experts minus that of random
ones lies above zero; and the other domains' rise is less than half of the own one on average. If taking random experts
is as selective, the claim is falsified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import ELSEWHERE, gap, means
from moekit.lab.experiments._league import BASE, DOMAINS, contestant, lead, setting, table, windows
from moekit.lab.experiments._probing import league, per_byte, probes
from moekit.nn.decomposed import Decomposed

MONET, DENSE, SHARE, MARGIN, ROWS = "monet", "dense", 0.1, 0.02, 32


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by contestant, and what switching experts off does. ``text`` is not used."""
    arms = {
        BASE: contestant(),
        MONET: contestant("monet"),
        DENSE: contestant(feed_forward="dense", intermediate_size=296),
    }
    found = league(arms, seeds, advance, "domains", {MONET: knowledge})
    switched = [{name.removeprefix(f"{MONET} "): value for name, value in one.items()} for one in probes(found)]
    figures = table(found) | {
        "switched_off": means(switched),
        "monet - dense": lead(found, MONET, DENSE),
        "chosen - random": gap(switched, "chosen, selectivity", "random, selectivity"),
    }
    return Outcome(shown=holds(figures), figures=figures, setting=setting(arms))


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    gap_to_dense, off = figures["monet - dense"], figures["switched_off"]
    return (
        (gap_to_dense["low"] <= 0 or gap_to_dense["mean"] <= MARGIN)
        and figures["chosen - random"]["low"] > 0
        and off["chosen, others"]["mean"] < 0.5 * off["chosen, own"]["mean"]
    )


@torch.no_grad()
def knowledge(model: Any, seed: int) -> dict[str, float]:
    """Rise in bits per byte of the own domain and of the others, with chosen and with random experts off."""
    layers = [module for module in model.modules() if isinstance(module, Decomposed)]
    usage = {domain: shares(model, layers, windows(domain, seed + ELSEWHERE)[:ROWS]) for domain in DOMAINS}
    before = {domain: per_byte(model, windows(domain, seed)[:ROWS]) for domain in DOMAINS}
    generator = torch.Generator().manual_seed(seed)
    found = dict[str, float]()
    for way in ("chosen", "random"):
        own, others = [], []
        for domain in DOMAINS:
            for number, layer in enumerate(layers):
                rest = torch.stack([usage[other][number] for other in DOMAINS if other != domain]).amax(0)
                excess = usage[domain][number] - rest
                layer.mask = kept(excess if way == "chosen" else torch.rand(excess.shape, generator=generator))
            rise = {other: per_byte(model, windows(other, seed)[:ROWS]) - before[other] for other in DOMAINS}
            own.append(rise.pop(domain))
            others.append(float(np.mean(list(rise.values()))))
        found |= {f"{way}, own": float(np.mean(own)), f"{way}, others": float(np.mean(others))}
        found[f"{way}, selectivity"] = found[f"{way}, own"] - found[f"{way}, others"]
    for layer in layers:
        layer.mask = None
    return found


def shares(model: Any, layers: Sequence[Decomposed], ids: Tensor) -> list[Tensor]:
    """Each expert's share of the routing weight [N, N], layer by layer."""
    mass: dict[Decomposed, Tensor] = {}

    def listen(layer: Any, args: Sequence[Any], _: Tensor) -> None:
        x_TH = args[0].reshape(-1, args[0].shape[-1])
        mass[layer] = layer.pairs(*layer.halves(x_TH, args[1])).mean(0)

    hooks = [layer.register_forward_hook(listen) for layer in layers]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [mass[layer] / mass[layer].sum() for layer in layers]


def kept(excess_NN: Tensor) -> Tensor:
    """bool [N, N]: all but the experts with the largest excess."""
    count = round(SHARE * excess_NN.numel())
    mask = torch.ones(excess_NN.numel(), dtype=torch.bool)
    mask[excess_NN.flatten().topk(count).indices] = False
    return mask.view_as(excess_NN)
