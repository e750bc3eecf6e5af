"""EAQuant (n 129): one smoothing scale for all, a router rounded by what it chooses, more tokens for starved experts.

Setting: the embedded model with planted outliers: in every layer 8 of the 192 channels that router and experts read are
16 times as large (the norm before times 16, all readers' columns divided by 16, which changes no output). Experts at 4
bits in groups of 64 by GPTQ, calibrated on 4096 sampled tokens per layer; activations at 4 bits are SIMULATED: what the
experts read and their hidden units are rounded per token to 16 even steps from least to greatest. The router stays
at 16 bits but where said. Contestants: no smoothing, the router's own scale alone, the largest scale over router and
all experts. KL divergence from the same model unrounded, on the test split of four domains.

Beside these, per layer and judged on sampled test tokens: how often the source model's own routers at 4 bits (8 would
not show) choose the same experts, ranges chosen by divergence or the whole; and the relative output error of the
starved experts (less than half an even share of 512 sampled tokens), calibrated at 4 bits on that sample or on one
with `balanced=2`.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of all five lie above zero:
KL without smoothing minus the router's scale, the router's scale minus all, none minus all (at or below zero falsifies
the claim), same choices of the router by divergence minus by whole ranges, error of starved experts without minus with
balance. The whole method (router at 8 bits besides) and the model without planted outliers are reported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.algebra import Asymmetric, round_to_nearest
from moekit.bank import SILU_MUL, Activation
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._calibrated import packed
from moekit.compress._fold import find_fold
from moekit.compress._router_grid import aligned
from moekit.compress._sample import Sample, output
from moekit.contract import Routing
from moekit.formats import DenseBank
from moekit.kernels import forward
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._rounding import CALIBRATED
from moekit.lab.experiments._seeds import differences, over_seeds
from moekit.lab.experiments._trial import DOMAINS, LENGTH, Trial
from moekit.plan import LayerPlan, LiveLoss, Plan, apply, values
from moekit.plan.recombine import recombined
from moekit.profile import Profile, profile

CHANNELS, FACTOR, LEVELS = 8, 16.0, 15
CONTESTANTS = {
    "none": "eaquant:smooth=none,router_bits=16",
    "router": "eaquant:smooth=router,router_bits=16",
    "all": "eaquant:router_bits=16",
    "whole method": "eaquant",
}
RULE = {
    "kl none - router": ("kl", "none", "router"),
    "kl router - all": ("kl", "router", "all"),
    "kl none - all": ("kl", "none", "all"),
    "same choices divergence - whole range": ("choices", "divergence", "whole range"),
    "starved error plain - balanced": ("starved", "plain", "balanced"),
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, agreements and errors, and the differences. ``text`` is not used."""
    own = Trial()
    found = []
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        with tempfile.TemporaryDirectory() as folder:
            planted = Trial(str(plant(own.source, Path(folder) / "planted", seed)))
            result = {"kl": losses(planted, CONTESTANTS, seed)}
        few = {name: CONTESTANTS[name] for name in ("none", "all")}
        result["kl without outliers"] = losses(own, few, seed)
        judge = observe(own, "test", seed, 4096)
        result["choices"] = choices(own, judge, seed)
        result["starved"] = starved(own, judge, seed)
        found.append(result)
    figures = summary(found)
    setting = {**own.setting, "channels": CHANNELS, "factor": FACTOR, "activation levels": LEVELS + 1}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def plant(source: Checkpoint, folder: Path, seed: int) -> Path:
    """The same model with larger channels between norms and their readers; powers of two, so that nothing rounds."""
    model, layers = source.skeleton(), {}
    for block in blocks(model):
        fold = find_fold(source, model, block)
        scale_H = torch.ones(block.hidden_size)
        draw = torch.Generator().manual_seed(1000 * seed + block.layer)
        scale_H[torch.randperm(block.hidden_size, generator=draw)[:CHANNELS]] = 1 / FACTOR
        edits, _ = fold.edits(source.read, scale_H)
        bank = source.bank(block.name)
        scaled = DenseBank((bank.gate_up * scale_H).to(bank.dtype), bank.down, activation=bank.activation)
        layers[block.name] = LayerPlan.identity(block.num_experts).valued(values.keep(scaled, edits), "planted")
    apply(source, Plan(source=source.fingerprint, layers=layers), folder)
    return folder


def losses(trial: Trial, contestants: Mapping[str, str], seed: int) -> dict[str, float]:
    """KL of each contestant with simulated 4-bit activations; "activations alone" rounds no weight."""
    seen = trial.seen(seed)
    plans = {name: method(spec).plan(seen, trial.source) for name, spec in contestants.items()}
    unchanged = Plan(source=trial.source.fingerprint, layers={})
    # The reference is taken here, before anything is changed.
    judges = [LiveLoss(trial.runner, trial.source, rows) for rows in trial.judging(seed).values()]
    found = {}
    for name, plan in {"activations alone": unchanged, **plans}.items():
        with simulated(trial, plan):
            found[name] = float(np.mean([judge(unchanged) for judge in judges]))
    return found


@contextmanager
def simulated(trial: Trial, plan: Plan) -> Iterator[None]:
    """The live model with the plan's experts and edits, its experts' inputs and hidden units rounded per token."""
    state = dict(trial.runner.model.named_parameters())
    names = trial.source.classified.parameters
    kept: dict[str, Tensor] = {}
    hooks = []
    for block in blocks(trial.runner.model):
        layer = plan.layers.get(block.name)
        bank = trial.source.bank(block.name)
        if layer is not None and layer.values is not None:
            bank = recombined(bank, layer)
            for name in layer.values.edits:
                kept[names[name]] = state[names[name]].data.clone()
                state[names[name]].data.copy_(layer.values.edit(name))
        bank = DenseBank(bank.gate_up.float(), bank.down.float(), activation=ROUNDED)

        def instead(_: Any, call: tuple[Tensor, ...], made: Tensor, bank: DenseBank = bank) -> Tensor:
            x_TH, expert_TK, weight_TK = call
            return forward(bank, even_steps(x_TH), Routing(expert_TK, weight_TK)).to(made.dtype)

        hooks.append(block.experts.register_forward_hook(instead))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in kept.items():
            state[parameter].data.copy_(before)


def even_steps(x_TC: Tensor) -> Tensor:
    """Every token's values at the nearest of 16 even steps from its least to its greatest."""
    low, high = x_TC.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / LEVELS).clamp_min(1e-12)
    return ((x_TC - low) / step).round() * step + low


ROUNDED = Activation("rounded to 16 steps", lambda z: even_steps(SILU_MUL(z)))


def observe(trial: Trial, split: str, seed: int, sample: int, balanced: float = 0.0) -> Profile:
    """A profile of one split's text that holds what is sampled."""
    return profile(
        trial.runner, {d: [trial.text(d, split, seed)] for d in DOMAINS}, sequence_length=LENGTH, held_out=0.0,
        tokenizer=trial.tokenizer, sample=sample, balanced=balanced, trace=0, seed=seed, statistics=CALIBRATED,
    )  # fmt: skip


def choices(trial: Trial, judge: Profile, seed: int) -> dict[str, float]:
    """Share of test tokens whose k experts are all the same under a router at 4 bits, mean over layers."""
    seen, same = trial.seen(seed), []
    for layer in trial.source.moe_layers:
        weight = trial.source.read(layer.row_tensors[0].name).float()
        chosen = aligned(weight, Sample.of(seen.layers[layer.name]).x_SH, layer.top_k, 4).weight
        whole = round_to_nearest(weight, Asymmetric(bits=4)).weight
        x_SH = Sample.of(judge.layers[layer.name]).x_SH
        top = [(x_SH @ router.T).topk(layer.top_k).indices.sort().values for router in (weight, chosen, whole)]
        same.append([float((other == top[0]).all(1).float().mean()) for other in top[1:]])
    divergence, whole_range = np.mean(same, axis=0)
    return {"divergence": float(divergence), "whole range": float(whole_range)}


def starved(trial: Trial, judge: Profile, seed: int) -> dict[str, float]:
    """Relative squared output error, on their own test tokens, of the experts that a plain sample starves; how many."""
    plain, more = (observe(trial, "calibration", seed, 512, balanced) for balanced in (0.0, 2.0))
    error, size, count = np.zeros(2), 0.0, 0
    for layer in trial.source.moe_layers:
        bank, test = trial.source.bank(layer.name), Sample.of(judge.layers[layer.name])
        samples = [Sample.of(seen.layers[layer.name]) for seen in (plain, more)]
        made = [packed(sample, bank, 4, 64)[0] for sample in samples]
        even = 512 * layer.top_k / layer.num_experts
        for e in samples[0].starved(int(even / 2)):
            x_NH = test.own(e).x_NH
            wanted, *others = (output(b.expert(e), bank.activation, x_NH) for b in (bank, *made))
            error += [float((other - wanted).square().sum()) for other in others]
            size, count = size + float(wanted.square().sum()), count + 1
    return {"plain": error[0] / max(size, 1e-30), "balanced": error[1] / max(size, 1e-30), "experts": float(count)}


def summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Intervals over seeds of every figure, and of the differences of the rule."""
    return {"rule": differences(found, RULE), **over_seeds(found)}
