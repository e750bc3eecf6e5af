"""D2MoE (n 68): what do nested planes cost against single widths, and do heads know which tokens need more bits?

Setting: the embedded model, planes of 2 to 4 bits in groups of 64 calibrated on 4096 sampled tokens per layer. Heads
are fitted to the same sample at the price, of 0.0002, 0.0005, 0.001 and 0.002, at which slots of every fourth layer run
nearest to 3 bits on average there. Judged by the KL divergence from the source on the test split of four domains.
Baselines: GPTQ at 2, 3 and 4 bits, stored apart; the widths that the heads choose dealt to random slots (mean of 2
draws): the same mean number of bits; planes at 3 bits for all.

Rule, written before the first run. `shown` if and only if all of these hold:

1. planes of 2 to 4 bits take fewer bytes than the three separate models together, and at most 1.25 times the one of 4;
2. the 95 % t interval over seeds of KL of random minus learned widths lies above zero. A tie falsifies the claim.

The gap of planes to separate rounding at each width is reported, as is 3 bits for all. The order in which planes are
loaded is another experiment's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.compress._heads import fit_widths, mean_width
from moekit.compress._sample import Sample
from moekit.compress.d2moe import planes
from moekit.formats import NestedBank
from moekit.kernels.rewrites import BitWidths
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._routing import DealtWidths, Judge, samples
from moekit.lab.experiments._seeds import differences, each_seed, over_seeds
from moekit.lab.experiments._trial import Trial
from moekit.plan import LayerPlan, Plan, values

BASE, WIDEST, GROUP, MEAN = 2, 4, 64, 3.0
PRICES = (0.0002, 0.0005, 0.001, 0.002)
DRAWS, MOST, EVERY = 2, 1.25, 4


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, bytes and the differences. ``text`` is not used."""
    trial = Trial(calibration=4096, test=1024)
    found = each_seed(seeds, advance, lambda seed: measure(trial, seed))
    figures = summary(found)
    return Outcome(shown=holds(figures), figures=figures, setting={**trial.setting, "bits": [BASE, WIDEST]})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    size = {name: one["mean"] for name, one in figures["bytes"].items()}
    apart = [size[f"gptq {width}"] for width in range(BASE, WIDEST + 1)]
    small = size["planes"] < sum(apart) and size["planes"] <= MOST * apart[-1]
    return bool(small and figures["gap"]["random - learned"]["low"] > 0)


def measure(trial: Trial, seed: int) -> dict[str, dict[str, float]]:
    """``kl`` and ``bytes`` of experts by contestant, ``bits`` per slot on the sample, and the ``price`` chosen."""
    judge, found = Judge(trial, seed), samples(trial.seen(seed))
    made = {name: planes(sample, trial.source.bank(name), WIDEST, BASE, GROUP)[0] for name, sample in found.items()}
    result: dict[str, dict[str, float]] = {"kl": {}, "bytes": {"planes": sum(bank.nbytes for bank in made.values())}}
    for width in range(BASE, WIDEST + 1):
        apart = trial.plan(f"gptq:bits={width},group_size={GROUP}", seed)
        stored = [layer.values for layer in apart.layers.values()]
        result["bytes"][f"gptq {width}"] = sum(one.bank().nbytes for one in stored if one is not None)
        result["kl"][f"gptq {width}"] = judge(apart).kl
        result["kl"][f"planes {width}"] = judge(whole(trial, made, width)).kl
    heads, price = fitted(trial, found, made)
    plan = whole(trial, made, WIDEST)
    result["kl"]["learned"] = judge(plan, heads, made).kl
    drawn = [judge(plan, {n: DealtWidths(h, 10 * seed + d) for n, h in heads.items()}, made).kl for d in range(DRAWS)]
    result["kl"]["random"] = float(np.mean(drawn))
    result["bits"] = {"learned": float(np.mean([mean_width(head, found[name]) for name, head in heads.items()]))}
    return result | {"price": {"learned": price}}


def whole(trial: Trial, made: Mapping[str, NestedBank], width: int) -> Plan:
    """Every expert at one width."""
    layers = {
        name: LayerPlan.identity(bank.num_experts, why="planes").valued(values.keep(bank.at(width)))
        for name, bank in made.items()
    }
    return Plan(source=trial.source.fingerprint, layers=layers)


def fitted(
    trial: Trial, found: Mapping[str, Sample], made: Mapping[str, NestedBank]
) -> tuple[dict[str, BitWidths], float]:
    """Heads of the price that comes nearest to :data:`MEAN` bits per slot, and the price."""

    def heads(names: Sequence[str], price: float) -> dict[str, BitWidths]:
        return {name: fit_widths(found[name], trial.source.bank(name), made[name], price)[0] for name in names}

    def off(price: float) -> float:
        tried = heads(list(found)[::EVERY], price)
        return abs(float(np.mean([mean_width(head, found[name]) for name, head in tried.items()])) - MEAN)

    price = min(PRICES, key=off)
    return heads(list(found), price), price


def summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Intervals over seeds of every figure, and of the differences."""
    pairs = {"random - learned": ("kl", "random", "learned"), "planes 3 - learned": ("kl", "planes 3", "learned")}
    pairs |= {f"planes {w} - gptq {w}": ("kl", f"planes {w}", f"gptq {w}") for w in range(BASE, WIDEST + 1)}
    return {"gap": differences(found, pairs), **over_seeds(found)}
