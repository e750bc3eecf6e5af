"""MC-MoE (n 82): do widths by importance beat equal and random ones, and skipping by ratio random skipping?

Setting: the embedded model, 4096 sampled tokens per layer from the calibration split of four domains; KL divergence
from the source on their test split. Bits: every layer's experts share 32 bits, 2 each on average. Contestants are made
of the same rounded experts: PMQ, 2 bits for all, the widths of PMQ dealt to random experts (mean of 4 draws), and PMQ
with the choices (phi) or the errors (eps) alone. Skipping, at full precision: ODP with 2 % of the tokens protected, its
numbers of slots dealt to random tokens (mean of 2 draws), and ODP without protection at the same share of slots.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of all three lie above zero:

1. KL of 2 bits for all minus PMQ, at equal bits;
2. KL of random widths minus PMQ, at equal bits. A tie falsifies the allocation;
3. KL of random skipping minus ODP, where half of the tokens stop after half of their slots, at equal slots.

The single factors, a quarter instead of half of the tokens, and protection decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.algebra import allocate_bits
from moekit.compress._bits import AT_LEAST, EXPONENTS, WIDTHS, importance, losses, rounded
from moekit.compress._calibrated import joined
from moekit.compress._sample import Sample
from moekit.compress._skip import ratio_skip
from moekit.formats import PackedBank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._routing import Judge, dealt, mean_kept, ratio_at, samples
from moekit.lab.experiments._seeds import differences, each_seed, over_seeds
from moekit.lab.experiments._trial import Trial
from moekit.plan import LayerPlan, Plan, values

GROUP, DRAWS, PROTECT = 64, 4, 0.02
FACTORS = {"pmq": EXPONENTS, "phi": (1.0, 0.0, 0.0), "eps": (0.0, 0.0, 2.0)}
SKIPS = {"half": 0.5, "quarter": 0.25}
PAIRS = {
    "equal - pmq": ("kl", "equal", "pmq"),
    "random - pmq": ("kl", "random", "pmq"),
    "random skip - odp": ("kl", "random skip half", "odp half"),
}
BESIDE = {
    "phi - pmq": ("kl", "phi", "pmq"),
    "eps - pmq": ("kl", "eps", "pmq"),
    "random skip - odp, quarter": ("kl", "random skip quarter", "odp quarter"),
    "unprotected - odp": ("kl", "unprotected half", "odp half"),
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by contestant and the differences. ``text`` is not used."""
    trial = Trial(calibration=4096, test=1024)
    found = each_seed(seeds, advance, lambda seed: measure(trial, seed))
    figures = summary(found)
    return Outcome(shown=holds(figures), figures=figures, setting={**trial.setting, "bits": 2, "group_size": GROUP})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(figures["rule"][name]["low"] > 0 for name in PAIRS)


def measure(trial: Trial, seed: int) -> dict[str, dict[str, float]]:
    """``kl`` by contestant, and the share of slots that ran (``kept``) where some are skipped."""
    judge, seen = Judge(trial, seed), trial.seen(seed)
    kl = {name: judge(plan).kl for name, plan in _allocated(trial, seed).items()}
    kl["random"] = float(np.mean([kl.pop(f"random {draw}") for draw in range(DRAWS)]))
    kept: dict[str, float] = {}
    found = samples(seen)
    for name, share in SKIPS.items():
        odp = {layer: ratio_skip(sample, share, PROTECT) for layer, sample in found.items()}
        kl[f"odp {name}"], kept[f"odp {name}"] = judge(judge.whole(), odp)
        drawn = [judge(judge.whole(), {n: dealt(one, 10 * seed + d) for n, one in odp.items()}) for d in range(2)]
        kl[f"random skip {name}"] = float(np.mean([one.kl for one in drawn]))
        kept[f"random skip {name}"] = float(np.mean([one.kept for one in drawn]))
        if name == "half":
            free = ratio_at(found, mean_kept(odp, found))
            kl[f"unprotected {name}"], kept[f"unprotected {name}"] = judge(judge.whole(), free)
    return {"kl": kl, "kept": kept}


def _allocated(trial: Trial, seed: int) -> dict[str, Plan]:
    """Plans by contestant; every expert is rounded once at each width."""
    layers: dict[str, dict[str, LayerPlan]] = {}
    for layer, seen in trial.seen(seed).layers.items():
        sample, bank = Sample.of(seen), trial.source.bank(layer)
        banks, _ = rounded(sample, bank, GROUP)
        eps_EB = losses(sample, bank, banks)
        chosen: dict[str, Sequence[int]] = {"equal": [2] * bank.num_experts}
        for name, (alpha, beta, gamma) in FACTORS.items():
            loss_EB = importance(seen, (alpha, beta))[:, None] * (eps_EB**gamma if gamma else _narrow(eps_EB))
            chosen[name] = allocate_bits(loss_EB, WIDTHS, 2 * bank.num_experts, at_least=AT_LEAST)
        for draw in range(DRAWS):
            order = np.random.default_rng((seed, draw, len(layers.get("equal", ())))).permutation(bank.num_experts)
            chosen[f"random {draw}"] = [chosen["pmq"][i] for i in order]
        for name, widths in chosen.items():
            layers.setdefault(name, {})[layer] = _mixed(banks, widths)
    return {name: Plan(source=trial.source.fingerprint, layers=found) for name, found in layers.items()}


def _narrow(eps_EB: np.ndarray) -> np.ndarray:
    """The same error for every expert, the mean at each width: what is left if errors do not count."""
    return np.broadcast_to((eps_EB**2).mean(0), eps_EB.shape)


def _mixed(banks: Sequence[PackedBank], widths: Sequence[int]) -> LayerPlan:
    made = joined([banks[WIDTHS.index(width)].select([e]) for e, width in enumerate(widths)])
    return LayerPlan.identity(len(widths), why="mixed widths").valued(values.keep(made))


def summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Intervals over seeds of every figure, and of the differences."""
    return {"rule": differences(found, PAIRS), "beside": differences(found, BESIDE), **over_seeds(found)}
