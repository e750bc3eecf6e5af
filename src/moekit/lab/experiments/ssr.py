"""Selective Sinkhorn routing (n 57): does one balanced step in a hundred replace the load-balancing loss?

Setting: the league's protocol. Arms: no balance at all; plain (load loss 0.01); SSR at the recipe's options (1 % of
steps and layers, no gradient through the plan); SSR with the gradient; SSR at 10 % of steps with the gradient; and
every step by Sinkhorn with the gradient, as earlier methods have it. Load: MaxVio on the judge's text, where all arms
route by softmax. Processor seconds of training are reported as a share of the plain arm's; other work ran beside.

Rule, written before the first run. `shown` if and only if SSR's MaxVio is at most half of that without balance and the
95 % t interval over seeds of that difference lies above zero, and the interval of plain minus SSR, in bits per byte,
lies above -0.01 (it loses no more than that to the loss it replaces). A load as uneven as without balance falsifies the
claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments import _league as league
from moekit.lab.experiments._seeds import interval

NONE, PLAIN, OURS = "no balance", "plain", "ssr"
ACTIVATION = {"kind": "selective-sinkhorn", "share": 0.01, "temperature": 0.5, "noise": 0.1}


def arms() -> dict[str, Any]:
    """The contestants by name."""

    def routed(**options: Any) -> Any:
        return league.contestant("ssr", router={"activation": {**ACTIVATION, **options}})

    return {
        NONE: league.contestant(balance={"load": 0.0}),
        PLAIN: league.contestant(),
        OURS: league.contestant("ssr"),
        "ssr, gradient": routed(detach=False),
        "ssr, gradient, 10 %": routed(detach=False, share=0.1),
        "every step, gradient": routed(detach=False, share=1.0),
    }


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return the league's figures of every arm and the rule's differences. ``text`` is not used."""
    contestants = arms()
    found = league.league(contestants, seeds, advance)
    figures = league.table(found)
    seconds = league.column(found, "processor_seconds")
    figures["seconds over plain"] = {
        name: interval([one[name] / one[PLAIN] for one in seconds]) for name in contestants if name != PLAIN
    }
    figures["rule"] = {
        "bits": league.lead(found, PLAIN, OURS),
        "load": interval([one[NONE]["max_violation"] - one[OURS]["max_violation"] for one in found]),
    }
    return Outcome(shown=holds(figures), figures=figures, setting=league.setting(contestants))


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    load = figures["max_violation"]
    halved = load[OURS]["mean"] <= 0.5 * load[NONE]["mean"]
    return bool(halved and figures["rule"]["load"]["low"] > 0 and figures["rule"]["bits"]["low"] > -0.01)
