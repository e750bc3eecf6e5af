"""Hydra (n 64): what do chunk routing, the memory and a branch that is switched on late cost in a hybrid model?

Setting: the protocol of ``_league``. Contestants: ``chunks of 8``, the recipe; ``tokens`` (every token routed by
itself) and ``chunks of 32``; ``looking ahead``, chunks of 8 routed by their own mean as in the released prototype,
whose loss is no honest one and is reported only; ``shared expert``, with one of as many parameters in the memory's
place (and more active ones), and ``no memory``, with nothing there; ``no attention``, state-space layers alone; the
base recipe for the scale. A late branch: in the trained ``no attention``, untrained attention is added in the two
layers where the recipe has it, with the gate at 0.15 or at 1. Nothing is trained after that, so this is the jump alone.

The paper claims no quality; the rule is about the parts that it describes. Written before the first run: `shown` if and
only if, over seeds (95 % t intervals, bits per byte): chunks of 8 minus tokens does not lie above 0.02; shared expert
minus chunks of 8 lies above zero; and the late branch at 0.15 costs 0.02 at most and less than at 1 (its upper end
is not above 0.02, and the difference lies above zero).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import BASE, contestant, lead, setting, table
from moekit.lab.experiments._probing import bits, league, probes
from moekit.nn import MoekitConfig, MoekitForCausalLM

KEY, CHUNKS, TOKENS, LONG, AHEAD = "hydra", "chunks of 8", "tokens", "chunks of 32", "looking ahead"
SHARED, NO_MEMORY, NO_ATTENTION, MARGIN = "shared expert", "no memory", "no attention", 0.02
GATES = {"at 0.15": 0.15, "at 1": 1.0}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by contestant, and what a late branch costs. ``text`` is not used."""
    arms = {
        BASE: contestant(),
        CHUNKS: contestant(KEY),
        TOKENS: contestant(KEY, router={"granularity": "token"}),
        LONG: contestant(KEY, router={"granularity": {"kind": "chunk", "length": 32}}),
        AHEAD: contestant(KEY, router={"granularity": {"kind": "chunk", "length": 8, "causal": False}}),
        SHARED: contestant(KEY, memory=None, shared_expert_intermediate_size=256),
        NO_MEMORY: contestant(KEY, memory=None),
        NO_ATTENTION: contestant(KEY, attention={"kind": "state-space", "expand": 1}),
    }
    found = league(arms, seeds, advance, "late-branch", {NO_ATTENTION: late})
    jumps = probes(found)
    figures = table(found) | {
        "late_branch": means(jumps),
        "chunks - tokens": lead(found, CHUNKS, TOKENS),
        "shared expert - chunks": lead(found, SHARED, CHUNKS),
        "no memory - chunks": lead(found, NO_MEMORY, CHUNKS),
        "at 1 - at 0.15": gap(jumps, f"{NO_ATTENTION} at 1", f"{NO_ATTENTION} at 0.15"),
    }
    return Outcome(shown=holds(figures), figures=figures, setting=setting(arms))


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return (
        figures["chunks - tokens"]["low"] <= MARGIN
        and figures["shared expert - chunks"]["low"] > 0
        and figures["late_branch"][f"{NO_ATTENTION} at 0.15"]["high"] <= MARGIN
        and figures["at 1 - at 0.15"]["low"] > 0
    )


def late(model: Any, seed: int) -> dict[str, float]:
    """The rise in bits per byte when untrained attention is switched on, by its gate."""
    before, found = bits(model, seed), {}
    for name, gate in GATES.items():
        attention = [
            {**spec, "gates": [1.0, gate]} if spec["kind"] == "sum" else spec
            for spec in contestant(KEY).model["attention"]
        ]
        torch.manual_seed(seed)
        other = MoekitForCausalLM(MoekitConfig(**{**model.config.to_dict(), "attention": attention})).eval()
        names = other.state_dict()
        for weight, value in model.state_dict().items():
            inside = weight.replace("self_attn.", "self_attn.mixers.0.")
            names[weight if weight in names else inside] = value
        other.load_state_dict(names)
        found[name] = bits(other, seed) - before
    return found
