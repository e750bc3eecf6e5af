"""RMoE (n 41): does a router that remembers earlier layers choose better, and is it the memory that does it?

Setting: the protocol of ``_league``, the same experts throughout. Contestants: the base recipe (linear router);
``mlp``, a router of one hidden layer with as many parameters as RMoE's (41 units); ``rmoe``; ``rmoe, detached``, whose
gradient does not pass from layer to layer.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of (mlp minus rmoe),
(detached minus rmoe) and (linear minus rmoe) in bits per byte all lie above zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table

MLP, RMOE, DETACHED = "mlp", "rmoe", "rmoe, detached"


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses and parameters, and RMoE's lead over each. ``text`` is not used."""
    arms = {
        BASE: contestant(),
        MLP: contestant(router={"score": {"kind": "mlp", "width": 41}}),
        RMOE: contestant("rmoe"),
        DETACHED: contestant("rmoe", router={"score": {"kind": "recurrent", "width": 32, "detach": True}}),
    }
    found = league(arms, seeds, advance)
    leads = {name: lead(found, name, RMOE) for name in arms if name != RMOE}
    return Outcome(
        shown=all(one["low"] > 0 for one in leads.values()),
        figures=table(found) | {"minus_rmoe": leads},
        setting=setting(arms),
    )
