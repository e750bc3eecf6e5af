"""AdaMoE-VLA (n 137): where balance presses on the router, do weights of their own lose less of the task?

Setting: a toy policy (12 observations to 6 actions in four modes, one of which makes up 64 % of all examples; each mode
is a random function of its own) with one residual feed-forward layer of width 48 at size 32, trained 400 steps of 256
examples. Upcycled into 4 experts (copies), k = 1, and trained 300 more steps with a load loss of weight 0, 0.01, 0.1
and 1 (our E sum f P; the paper's mean form with its 0.01 is 0.0006 of ours) and z-loss 1e-4. Arms: "vanilla", the
weight is the softmax probability of the chosen one; "decoupled", plus the scale; "decoupled from zero", the same with
the scale starting at 0. Error: mean squared error on 4,096 test examples, divided by the variance of the targets.
Upcycling keeps the function only if weights are 1: the gap at the start is reported. Mean of 2 policies a seed.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds lie above zero for: the error
of vanilla minus that of decoupled at the largest weight; and how much more vanilla's error rises from weight 0 to the
largest than decoupled's does. Curves that coincide falsify the claim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._league import Use
from moekit.lab.experiments._seeds import each_seed, interval, over_seeds
from moekit.lab.experiments._toys import Batch, Toy, answers, fit, moe, parameters
from moekit.nn import Site
from moekit.nn.correction import max_violation
from moekit.nn.flow import carry

OBSERVED, ACTIONS, MODES, SIZE, WIDTH, EXPERTS = 12, 6, 4, 32, 48, 4
BATCH, FIRST, THEN, RATE, TEST, REPEATS = 256, 400, 300, 3e-3, 4096, 2
SHARES = torch.tensor([0.64, 0.12, 0.12, 0.12])
WEIGHTS = (0.0, 0.01, 0.1, 1.0)
WEIGHERS: dict[str, Any] = {
    "vanilla": {"kind": "scores", "normalise": False},
    "decoupled": "decoupled",
    "decoupled from zero": {"kind": "decoupled", "start": "zero"},
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return errors and loads by arm and weight, gaps at the start, the rule's differences. ``text`` is not used."""
    found = each_seed(seeds, advance, measure)
    figures = over_seeds(found)
    largest, least = (str(weight) for weight in (WEIGHTS[-1], WEIGHTS[0]))
    at = [{arm: one["error"][arm][largest] for arm in WEIGHERS} for one in found]
    rise = [{arm: one["error"][arm][largest] - one["error"][arm][least] for arm in WEIGHERS} for one in found]
    figures["rule"] = {
        "at the largest weight": interval([one["vanilla"] - one["decoupled"] for one in at]),
        "in how much it rises": interval([one["vanilla"] - one["decoupled"] for one in rise]),
    }
    return Outcome(shown=holds(figures), figures=figures, setting={"experts": EXPERTS, "k": 1, "test": TEST})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def measure(seed: int) -> dict[str, Any]:
    """Means over a few policies of one seed."""
    found = [policies(seed * 100 + repeat) for repeat in range(REPEATS)]
    return {
        figure: {
            arm: {str(weight): sum(one[arm][weight][figure] for one in found) / REPEATS for weight in WEIGHTS}
            for arm in WEIGHERS
        }
        for figure in ("error", "max_violation", "gap at the start", "total", "active")
    }


def policies(seed: int) -> dict[str, dict[float, dict[str, float]]]:
    """Every arm at every weight, upcycled from one dense policy."""
    torch.manual_seed(seed)
    draw, test = world()
    site = Site(hidden_size=SIZE, intermediate_size=WIDTH, num_experts=1, top_k=1)
    dense = Toy(OBSERVED + MODES, SIZE, ACTIONS, [moe(site)])
    fit(dense, lambda step: draw(BATCH), FIRST, RATE)
    found: dict[str, dict[float, dict[str, float]]] = {arm: {} for arm in WEIGHERS}
    for arm, weigher in WEIGHERS.items():
        for weight in WEIGHTS:
            torch.manual_seed(seed + 1)
            model = upcycled(dense, weigher, weight)
            apart = float((answers(model, test[0])[0] - answers(dense, test[0])[0]).square().mean() / test[1].var())
            fit(model, lambda step: draw(BATCH), THEN, RATE / 3)
            found[arm][weight] = judged(model, test) | {"gap at the start": apart}
    return found


def world() -> tuple[Any, tuple[Tensor, Tensor]]:
    """A way to draw examples of a random world, and its test set."""
    modes = [nn.Sequential(nn.Linear(OBSERVED, 24), nn.Tanh(), nn.Linear(24, ACTIONS)) for _ in range(MODES)]
    for mode in modes:
        mode.requires_grad_(False)
        nn.init.normal_(mode[0].weight, std=OBSERVED**-0.5)
        nn.init.normal_(mode[2].weight, std=24**-0.5)

    def draw(count: int) -> Batch:
        seen = torch.randn(count, OBSERVED)
        mode = torch.multinomial(SHARES, count, replacement=True)
        cue = nn.functional.one_hot(mode, MODES) + 0.3 * torch.randn(count, MODES)
        action = torch.stack([each(seen) for each in modes], 1)[torch.arange(count), mode]
        return torch.cat((seen, cue), 1), action, {}

    x, wanted, _ = draw(TEST)
    return draw, (x, wanted)


def upcycled(dense: Toy, weigher: Any, weight: float) -> Toy:
    """The dense policy with its feed-forward layer as every one of the experts."""
    model = copy.deepcopy(dense)
    site = Site(hidden_size=SIZE, intermediate_size=WIDTH, num_experts=EXPERTS, top_k=1)
    layer = moe(site, {"weigh": weigher}, balance={"load": weight, "z": 1e-4})
    with torch.no_grad():
        for new, old in zip(layer.experts.parameters(), dense.layers[0].experts.parameters(), strict=True):
            new.copy_(old.expand_as(new))
    model.layers[0] = layer
    return model


def judged(model: Toy, test: tuple[Tensor, Tensor]) -> dict[str, float]:
    with Use(model) as use:
        out, context = answers(model, test[0])
    return {
        "error": float((out - test[1]).square().mean() / test[1].var()),
        "max_violation": max_violation(carry(context).load[0]),
        "total": float(parameters(model)),
        "active": use.active(len(test[0])),
    }
