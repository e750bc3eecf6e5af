"""QMoE (n 48): how far does ternary rounding with feedback get, and does the dictionary code go below one bit?

Setting: the embedded model, every expert of every layer. Contestants: GPTQ at 2 bits on the grid between a row's least
and greatest weight (one group per row, as in the paper), ternary GPTQ (the method), ternary rounding to nearest on the
same grid. Both GPTQs are calibrated on the same 4096 sampled tokens per layer. Judged on the test split of four
domains: KL divergence from the source, and the relative squared error of what the MoE layers add.

Rule, written before the first run. `shown` if and only if both hold:

1. the 95 % t intervals over seeds lie above zero for: KL of ternary GPTQ minus 2-bit GPTQ, KL of ternary rounding minus
   ternary GPTQ, MoE-output error of ternary rounding minus ternary GPTQ. If feedback does not beat rounding on the
   layers' outputs, the claim is falsified;
2. the stored experts take less than one bit per weight, offsets and levels counted: the name of the method.

The code pays from about 82 % zeros on. How many there are depends on how far the extremes of a row lie from the rest,
which grows with its length: rates of normally distributed rows as wide as a public model's are reported beside, rounded
to nearest, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moekit.formats import DenseBank, TernaryBank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._rounding import CALIBRATED, output_error
from moekit.lab.experiments._seeds import differences, each_seed, over_seeds
from moekit.lab.experiments._trial import DOMAINS, LENGTH, Trial
from moekit.plan import LayerPlan, Plan, values
from moekit.profile import profile

ROW = 4096
"""A group size that no row exceeds."""
WIDTHS = (192, 1024, 2048, 4096)
PAIRS = {
    "kl ternary - two": ("kl", "ternary", "two"),
    "kl nearest - ternary": ("kl", "nearest", "ternary"),
    "error nearest - ternary": ("error", "nearest", "ternary"),
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, rates and the differences. ``text`` is not used."""
    trial = Trial(test=4096)
    found = each_seed(seeds, advance, lambda seed: measure(trial, seed))
    figures = summary(found) | {"wide": {f"{width} columns": wide(width) for width in WIDTHS}}
    return Outcome(shown=holds(figures), figures=figures, setting={**trial.setting, "sample": 4096})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["gap"].values()) and figures["bits"]["ternary"]["high"] < 1


def measure(trial: Trial, seed: int) -> dict[str, dict[str, float]]:
    """``kl``, ``error``, ``bits`` per weight and ``zeros`` by contestant."""
    plans = {
        "two": trial.plan(f"gptq:bits=2,group_size={ROW}", seed),
        "ternary": trial.plan("qmoe", seed),
        "nearest": nearest(trial),
    }
    test = {domain: [trial.text(domain, "test", seed)] for domain in DOMAINS}
    judge = profile(
        trial.runner, test, sequence_length=LENGTH, held_out=0.0, tokenizer=trial.tokenizer, sample=8192, trace=0,
        seed=seed, statistics=CALIBRATED,
    )  # fmt: skip
    result: dict[str, dict[str, float]] = {"kl": {}, "error": {}, "bits": {}, "zeros": {}}
    for name, plan in plans.items():
        result["kl"][name] = trial.loss(plan, seed)
        result["error"][name] = output_error(plan, trial.source, judge)
        result["bits"][name], result["zeros"][name] = rates(plan)
    return result


def nearest(trial: Trial) -> Plan:
    """Every expert rounded to the nearest of its rows' least weight, zero and greatest."""
    layers = {
        layer.name: LayerPlan.identity(layer.num_experts).valued(
            values.keep(TernaryBank.quantise(trial.source.bank(layer.name))), "ternary, rounded to nearest"
        )
        for layer in trial.source.moe_layers
    }
    return Plan(source=trial.source.fingerprint, layers=layers)


def rates(plan: Plan) -> tuple[float, float]:
    """(bits per weight as stored, share of weights that are zero), over all layers."""
    stored = weights = zeros = 0
    for layer in plan.layers.values():
        assert layer.values is not None
        bank = layer.values.bank()
        stored += sum(tensor.nbytes for tensor in bank.tensors().values())
        for e in range(bank.num_experts):
            for matrix in (bank.expert(e).gate_up, bank.expert(e).down):
                weights += matrix.numel()
                zeros += int((matrix == 0).sum())
    return 8 * stored / weights, zeros / weights


def wide(columns: int) -> dict[str, float]:
    """Rates of normal weights with rows of so many columns, as gate and up (and down) of one expert."""
    draw = torch.Generator().manual_seed(0)
    bank = TernaryBank.quantise(
        DenseBank(torch.randn(1, 2 * 256, columns, generator=draw), torch.randn(1, columns, 256, generator=draw))
    )
    symbols = bank.matrix(0, "gate_up")
    stored = sum(tensor.nbytes for name, tensor in bank.tensors().items() if ".gate_up." in name)
    return {"zeros": float((symbols == 0).float().mean()), "bits": 8 * stored / symbols.numel()}


def summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Intervals over seeds of every figure, and of the differences of the rule."""
    return {"gap": differences(found, PAIRS), **over_seeds(found)}
