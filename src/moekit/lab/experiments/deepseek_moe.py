"""DeepSeekMoE (n 6): are finer experts better at equal parameters, is a shared one, and do they repeat each other less?

Setting: the protocol of ``_league``. Contestants, all with 16 of the base's expert widths in total and 4 at work: the
base recipe; ``coarse``, the base with raw softmax weights as in the paper; ``fine``, 16 of 64 slivers; ``shared``, the
recipe: 12 of 60 and 4 always on. Besides, for loss-free balancing, ``sigmoid`` (the recipe with sigmoid scores made to
sum to 1) and ``bias`` (the same with the bias, rate 0.001, instead of the loss). Judged further with the highest-
scored 1/16, 2/16 and 4/16 of the routed experts barred from every token, and ``shared`` with its shared expert gone
and as many slivers more chosen.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of all these lie above zero,
in bits per byte:

1. (coarse minus fine), (coarse minus shared) and (base minus shared);
2. what barring 2/16 costs ``shared`` minus what it costs ``coarse``: finer experts can stand in for each other less;
3. what losing the shared expert costs ``shared`` minus what barring 1/16 does, as many slivers.

Loss-free balancing is reported (MaxVio and bits per byte of ``sigmoid`` and ``bias``) and is no part of the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moekit.contract import Context
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import BASE, column, contestant, lead, paper, setting, table
from moekit.lab.experiments._probing import bits, league, probes
from moekit.nn import MoE
from moekit.train.recipe import Recipe

KEY, COARSE, FINE, SHARED, SIGMOID, BIAS = paper(__name__), "coarse", "fine", "shared", "sigmoid", "bias"
PARTS = (1, 2, 4)
LOST = "shared expert lost"


def arms() -> dict[str, Recipe]:
    """The contestants."""
    raw = {"weigh": {"kind": "scores", "normalise": False}}
    even = {"activation": "sigmoid", "weigh": "scores"}
    own = {"kind": "load", "weight": 0.01, "probability": "scores"}
    return {
        BASE: contestant(),
        COARSE: contestant(router=raw),
        FINE: contestant(router=raw, num_experts=64, num_experts_per_tok=16, moe_intermediate_size=12),
        SHARED: contestant(KEY),
        SIGMOID: contestant(KEY, router=even, balance={"load": own}),
        BIAS: contestant(KEY, router=even, balance={"load": 0.0}, correction={"rate": 0.001}),
    }


class Barred(nn.Module):
    """A selector that may not choose a token's ``count`` highest scores."""

    def __init__(self, selector: nn.Module, count: int) -> None:
        super().__init__()
        self.selector, self.count = selector, count

    def forward(self, scores_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        highest = scores_TE.topk(self.count, dim=1).indices
        return self.selector(scores_TE.scatter(1, highest, -float("inf")), context, bias)


def losses(model: Any, seed: int) -> dict[str, float]:
    """By how much bits per byte rise with a token's best experts barred, and without the shared one."""
    whole, found = bits(model, seed), {}
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for part in PARTS:
        for layer in layers:
            layer.gate.selector = Barred(layer.gate.selector, round(layer.num_experts * part / 16))
        found[f"{part}/16 barred"] = bits(model, seed) - whole
        for layer in layers:
            layer.gate.selector = layer.gate.selector.selector
    if layers[0].shared_expert is not None:
        for layer in layers:
            layer.shared_expert = None
            layer.gate.selector.k += 4
        found[LOST] = bits(model, seed) - whole
    return found


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, parameters and what is lost with experts. ``text`` is not used."""
    found = league(arms(), seeds, advance, "barred", dict.fromkeys((COARSE, FINE, SHARED), losses))
    rises, violation = probes(found), column(found, "max_violation")
    gaps = {
        "coarse - fine": lead(found, COARSE, FINE),
        "coarse - shared": lead(found, COARSE, SHARED),
        "base - shared": lead(found, BASE, SHARED),
        "shared - coarse, 2/16 barred": gap(rises, f"{SHARED} 2/16 barred", f"{COARSE} 2/16 barred"),
        "shared expert - 1/16 barred": gap(rises, f"{SHARED} {LOST}", f"{SHARED} 1/16 barred"),
    }
    bias = {"bits_per_byte": lead(found, SIGMOID, BIAS), "max_violation": gap(violation, SIGMOID, BIAS)}
    figures = table(found) | {"gap": gaps, "rise": means(rises), "sigmoid_minus_bias": bias}
    return Outcome(shown=holds(gaps), figures=figures, setting=setting(arms()))


def holds(gaps: Mapping[str, Mapping[str, float]]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in gaps.values())
