"""MoFME (n 145): do modulations of one base restore as well as full experts with far fewer parameters?

Setting: toy restoration. A clean signal is 32 samples of three sinusoids; it is corrupted by noise, by spikes ("rain"),
or by fading towards a constant ("haze"), at random strength. One signal is one token; two residual layers at size 32,
800 steps of 128 signals, 2,048 test signals, PSNR with the signals' range as peak. Arms: "modulated", 8 experts, k = 2,
linear modulations, calibrated router (5 passes, dropout 0.1); "plain router", the same without calibration; "full", 8
gated experts with the 8 H^2 parameters each of a feed-forward of four times the width, k = 2; "one expert", the
modulated layer with a single expert, which is no mixture. All with load loss 0.01. Calibration of the last layer's
router: expected calibration error (10 bins) of its highest probability as the chance that this expert, used alone,
restores best. Mean of 2 runs a seed.

Rule, written before the first run. `shown` if and only if the modulated experts have at least 60 % fewer parameters in
their layers than the full ones, the 95 % t interval over seeds of their PSNR minus that of the full experts lies above
-0.1 dB, and that of their PSNR minus the single expert's above zero. A single expert that ties falsifies the claim.
What the calibrated router is worth (PSNR, calibration error) is reported: its formula is our reading of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._seeds import differences, each_seed, over_seeds
from moekit.lab.experiments._toys import Batch, Toy, answers, context_of, fit, moe, parameters
from moekit.nn import Site

SAMPLES, SIZE, LAYERS, EXPERTS, K = 32, 32, 2, 8, 2
STEPS, BATCH, RATE, TEST, REPEATS = 800, 128, 3e-3, 2048, 2
FULL_WIDTH, ADAPTOR = round(8 * SIZE / 3), 2 * SIZE
CALIBRATED = {"score": "calibrated"}
MODULATED = {"kind": "modulated", "width": ADAPTOR}
ARMS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "modulated": (MODULATED, EXPERTS, CALIBRATED),
    "plain router": (MODULATED, EXPERTS, {}),
    "full": ("stacked", EXPERTS, {}),
    "one expert": (MODULATED, 1, {}),
}
"""Experts, how many, and the router."""


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return PSNR, parameters and calibration errors of every arm, and the rule's gaps. ``text`` is not used."""
    found = each_seed(seeds, advance, measure)
    figures = over_seeds(found)
    pairs = {
        "over full": ("psnr", "modulated", "full"),
        "over one expert": ("psnr", "modulated", "one expert"),
        "over plain router": ("psnr", "modulated", "plain router"),
    }
    figures["gaps"] = differences(found, pairs)
    return Outcome(shown=holds(figures), figures=figures, setting={"experts": EXPERTS, "k": K, "steps": STEPS})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    size = {arm: figures["parameters"][arm]["mean"] for arm in ("modulated", "full")}
    fewer = size["modulated"] <= 0.4 * size["full"]
    return bool(fewer and figures["gaps"]["over full"]["low"] > -0.1 and figures["gaps"]["over one expert"]["low"] > 0)


def measure(seed: int) -> dict[str, dict[str, float]]:
    """Means over a few runs of one seed."""
    found = [restorers(seed * 100 + repeat) for repeat in range(REPEATS)]
    return {
        figure: {arm: sum(one[arm][figure] for one in found) / REPEATS for arm in ARMS if figure in found[0][arm]}
        for figure in ("psnr", "parameters", "calibration error")
    }


def restorers(seed: int) -> dict[str, dict[str, float]]:
    """Every arm on the same signals."""
    torch.manual_seed(seed)
    test, found = corrupted(TEST), {}
    for arm, (bank, count, router) in ARMS.items():
        torch.manual_seed(seed + 1)
        site = Site(
            hidden_size=SIZE, intermediate_size=FULL_WIDTH, num_experts=count, top_k=min(K, count), activation="gelu"
        )
        layers = [moe(site, router, bank=bank, balance={"load": 0.01}) for _ in range(LAYERS)]
        model = Toy(SAMPLES, SIZE, SAMPLES, layers)
        fit(model, lambda step: corrupted(BATCH), STEPS, RATE)
        out, _ = answers(model, test[0])
        found[arm] = {
            "psnr": -10 * math.log10(float((out - test[1]).square().mean()) / 4),  # signals lie between -1 and 1
            "parameters": float(sum(parameters(layer) for layer in layers)),
        }
        if count > 1:
            found[arm]["calibration error"] = calibration_error(*confidence(model, test))
    return found


def corrupted(count: int) -> Batch:
    """(corrupted [T, 32], clean [T, 32], {})."""
    time = torch.arange(SAMPLES) / SAMPLES
    rate, phase, weight = (
        1 + 5 * torch.rand(count, 3, 1),
        2 * math.pi * torch.rand(count, 3, 1),
        torch.rand(count, 3, 1),
    )
    clean = (weight * torch.sin(2 * math.pi * rate * time + phase)).sum(1) / 3
    strength, kind = 0.2 + 0.6 * torch.rand(count, 1), torch.randint(0, 3, (count, 1))
    noisy = clean + 0.5 * strength * torch.randn_like(clean)
    spikes = clean + (torch.rand_like(clean) < 0.3 * strength) * (1 + torch.rand_like(clean))
    faded = (1 - strength) * clean + strength
    return torch.where(kind == 0, noisy, torch.where(kind == 1, spikes, faded)), clean, {}


@torch.no_grad()
def confidence(model: Toy, test: Batch) -> tuple[Tensor, Tensor]:
    """Of the last layer: (highest probability [T], whether that expert alone is the one that restores best [T])."""
    x, clean, _ = test
    context, hidden = context_of(x), model.enter(x)
    hidden = hidden + model.layers[0](model.norms[0](hidden), context)
    normed, last = model.norms[1](hidden), model.layers[1]
    probability = last.gate(normed, context)[0].softmax(-1)
    errors = []
    for expert in range(EXPERTS):
        index = torch.full((len(x), 1), expert)
        alone = hidden + last.experts(normed, index, torch.ones(len(x), 1))
        errors.append((model.leave(alone) - clean).square().mean(1))
    value, guess = probability.max(1)
    return value, torch.stack(errors, 1).argmin(1) == guess


def calibration_error(confidence_T: Tensor, right_T: Tensor, bins: int = 10) -> float:
    """Expected calibration error: how far confidence is from how often it is right, bin by bin."""
    place = (confidence_T * bins).long().clamp(max=bins - 1)
    total = 0.0
    for number in range(bins):
        own = place == number
        if bool(own.any()):
            total += float(own.float().mean() * (confidence_T[own].mean() - right_T[own].float().mean()).abs())
    return total
