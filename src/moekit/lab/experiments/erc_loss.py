"""ERC loss (n 142): does coupling routers to experts lower the loss, and does it couple rather than shrink?

Setting: the league's protocol. Arms: plain (load loss 0.01), with the coupling loss (weight 1, alpha 1, noise), and as
ablations without noise, with alpha 0.4, and with alpha 2. Of the plain and the coupled model: the coupling loss of the
trained weights without noise, mean over layers; the norm of router rows; eps, the relative half distance to the nearest
row; and how often the expert that a token ranks first is the one whose gate projection it excites most (4,096 tokens of
the judge's text).

Rule, written before the first run. `shown` if and only if the 95 % t interval over seeds of plain minus coupled, in
bits per byte, lies above zero, the coupled model's own loss ends below a tenth of the plain model's, and its router
rows keep at least half of the plain model's norm. Coupling that comes from shrinking rows alone falsifies the claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.contract import Context
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments import _league as league
from moekit.lab.experiments import _probing as probing
from moekit.lab.experiments._seeds import interval, over_seeds
from moekit.nn import MoE
from moekit.nn.coupling import coupled, excess, margins, responses

PLAIN, OURS = "plain", "coupled"
TOKENS = 4096


def arms() -> dict[str, Any]:
    """The contestants by name."""

    def weighed(**options: Any) -> Any:
        return league.contestant("erc-loss", balance={"coupling": {"weight": 1.0, **options}})

    return {
        PLAIN: league.contestant(),
        OURS: league.contestant("erc-loss"),
        "no noise": weighed(noise=False),
        "alpha 0.4": weighed(alpha=0.4),
        "alpha 2": weighed(alpha=2.0),
    }


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return the league's figures of every arm, and what became of rows and experts. ``text`` is not used."""
    contestants = arms()
    found = probing.league(contestants, seeds, advance, "coupling", {PLAIN: look, OURS: look})
    looked = [{name: one[name]["probe"] for name in (PLAIN, OURS)} for one in found]
    figures = league.table(found) | {"coupling": over_seeds(looked)}
    figures["rule"] = league.lead(found, PLAIN, OURS)
    figures["beside"] = {
        name: interval([one[PLAIN]["bits_per_byte"] - one[name]["bits_per_byte"] for one in found])
        for name in contestants
        if name not in (PLAIN, OURS)
    }
    return Outcome(shown=holds(figures), figures=figures, setting=league.setting(contestants))


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    plain, ours = figures["coupling"][PLAIN], figures["coupling"][OURS]
    couples = ours["loss"]["mean"] < 0.1 * plain["loss"]["mean"]
    keeps = ours["row norm"]["mean"] >= 0.5 * plain["row norm"]["mean"]
    return bool(figures["rule"]["low"] > 0 and couples and keeps)


@torch.no_grad()
def look(model: Any, seed: int) -> dict[str, float]:
    """The coupling of a trained model, mean over its layers."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    inputs = heard(model, layers, seed)
    figures: dict[str, list[float]] = {"loss": [], "row norm": [], "eps": [], "first excites most": []}
    for layer in layers:
        rows, gate = coupled(layer.gate, layer.experts)
        figures["loss"].append(float(excess(responses(rows, gate))))
        figures["row norm"].append(float(rows.norm(dim=1).mean()))
        figures["eps"].append(float(margins(rows).mean()))
        first = layer.gate.score(inputs[layer], Context()).argmax(1)
        figures["first excites most"].append(float((responses(inputs[layer], gate).argmax(1) == first).float().mean()))
    return {name: sum(values) / len(values) for name, values in figures.items()}


def heard(model: Any, layers: Sequence[MoE], seed: int) -> dict[MoE, Tensor]:
    """What each layer reads [T, H] on the judge's text."""
    kept: dict[MoE, Tensor] = {}

    def keep(layer: Any, args: tuple[Any, ...]) -> None:
        kept[layer] = args[0].reshape(-1, args[0].shape[-1])

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    rows = torch.cat([league.windows(domain, seed)[: TOKENS // 128 // 4] for domain in league.DOMAINS])
    model(input_ids=rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept
