"""Chain-of-Experts (n 4): do two passes of two experts beat one pass of four, and is it the passes that do it?

Setting: the protocol of ``_league``, 16 experts. Contestants: the base recipe (weights made to sum to 1); ``once``,
one pass of 4 experts, everything else as in the recipe; ``chain``, two passes of 2; ``one router`` for both passes;
``outer``, where h is added back and no pass adds what it reads; and without routing, ``dense`` (4 experts, all at
once) against ``dense chain`` (2 experts, both twice): as many active parameters, but half the experts' in all, which
is what passing twice means without routing.

Rule, written before the first run. `shown` if and only if all of these hold:

1. the 95 % t intervals over seeds of (once minus chain), (base minus chain), (one router minus chain) and (outer minus
   chain) in bits per byte all lie above zero;
2. the mean gain of the dense chain is smaller than that of the chain over ``once``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table
from moekit.train.recipe import Recipe

KEY, ONCE, CHAIN, ONE_ROUTER, OUTER = "chain-of-experts", "once", "chain", "one router", "outer"
DENSE, DENSE_CHAIN = "dense", "dense chain"


def arms() -> dict[str, Recipe]:
    """The contestants."""

    def chain(**options: Any) -> dict[str, Any]:
        return {"kind": "chain", "passes": 2, **options}

    return {
        BASE: contestant(),
        ONCE: contestant(KEY, wiring="residual", num_experts_per_tok=4),
        CHAIN: contestant(KEY),
        ONE_ROUTER: contestant(KEY, wiring=chain(own_routers=False)),
        OUTER: contestant(KEY, wiring=chain(inner=False, outer=True)),
        DENSE: contestant(KEY, wiring="residual", num_experts=4, num_experts_per_tok=4),
        DENSE_CHAIN: contestant(KEY, num_experts=2),
    }


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses and parameters, and the chain's lead over each. ``text`` is not used."""
    found = league(arms(), seeds, advance)
    leads = {name: lead(found, name, CHAIN) for name in (BASE, ONCE, ONE_ROUTER, OUTER)}
    leads["dense minus dense chain"] = lead(found, DENSE, DENSE_CHAIN)
    return Outcome(shown=holds(leads), figures=table(found) | {"minus_chain": leads}, setting=setting(arms()))


def holds(leads: Mapping[str, Mapping[str, float]]) -> bool:
    """The rule of the module's docstring."""
    ahead = all(leads[name]["low"] > 0 for name in (BASE, ONCE, ONE_ROUTER, OUTER))
    return ahead and leads["dense minus dense chain"]["mean"] < leads[ONCE]["mean"]
