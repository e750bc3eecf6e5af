"""Does a sparse model learn more than a dense one of equal active size in the same steps, and at what price in memory?

Setting: four models of one shape (4 layers, hidden size 96) trained from nothing for 200 steps of 512 tokens of the
embedded models' mixture, at 3e-3 with a linear fall: dense layers 64 wide (one expert's width), 128 wide (as many
active as the sparse model), 512 wide (as many in all), and 8 experts of 64, top-2. Every contestant of a seed sees the
same batches. Judged in bits per byte on the test split, mean over all domains; and by the report of `moekit eval
--efficiency` on 8 batches of 4 x 128 tokens. MCR compares with the dense model of equal total size, performance being
1 / bits per byte.

Rule, written before the first run. `shown` if and only if the 95 % t interval over seeds of the loss of the dense
model of equal active size minus the sparse model's lies above zero, and the sparse model's tensors take more bytes.
That no method dominates is what the table shows; it decides nothing. Times are of a shared machine and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moekit.lab._recipe import RECIPES
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import LENGTH, LM, Ground, gap, means
from moekit.measure.efficientllm import efficiency_report, tensor_bytes
from moekit.train import Objective, TrainOptions, distil

HIDDEN, LAYERS, WIDTH, EXPERTS, TOP_K = 96, 4, 64, 8, 2
STEPS, RATE, BATCHES = 200, 3e-3, 8
MODELS = {"dense-one": 1, "dense-active": TOP_K, "dense-total": EXPERTS, "sparse": TOP_K}
"""Width of a dense layer in experts; of the sparse model, what is active."""


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses and the six figures by model. ``text`` is not used: the mixture is what is trained on."""
    ground = Ground()
    found: list[dict[str, float]] = []
    reports: dict[str, Any] = {}
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        models = {name: train(ground, name, seed) for name in MODELS}
        found.append({name: ground.loss(model, seed) for name, model in models.items()})
        reports = report(ground, models, found[-1], seed)
    figures = summary(found, reports)
    setting = {"steps": STEPS, "experts": EXPERTS, "top_k": TOP_K, "tokens_per_step": 512, "hidden_size": HIDDEN}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    size = {name: one["tensor_bytes"] for name, one in figures["efficiency"].items()}
    return bool(figures["gap"]["dense-active"]["low"] > 0 and size["sparse"] > size["dense-active"])


def summary(found: Sequence[Mapping[str, float]], reports: Mapping[str, Any]) -> dict[str, Any]:
    """``bits_per_byte`` by model, ``gap`` of each dense model minus the sparse one, ``efficiency`` of the last seed."""
    dense = [name for name in MODELS if name != "sparse"]
    return {
        "bits_per_byte": means(found),
        "gap": {name: gap(found, name, "sparse") for name in dense},
        "efficiency": dict(reports),
    }


def train(ground: Ground, name: str, seed: int) -> Any:
    """One model, from nothing."""
    recipe = replace(
        RECIPES["moe" if name == "sparse" else "dense"],
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=MODELS[name],
        intermediate_size=WIDTH,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(recipe.config(), dtype=torch.float32)
    objective = Objective(kl=0.0, lm=1.0, balance=0.005) if name == "sparse" else LM
    options = TrainOptions(steps=STEPS, learning_rate=RATE, weight_decay=0.1, seed=seed)
    distil(model, None, ground.batches(seed), options, objective)
    return model.eval()


def report(ground: Ground, models: Mapping[str, Any], losses: Mapping[str, float], seed: int) -> dict[str, Any]:
    """The six figures of every model."""
    batches = ground.batches(seed + 1)
    work = [{"input_ids": batches(step)["input_ids"][:, :LENGTH]} for step in range(BATCHES)]
    size = float(tensor_bytes(models["dense-total"]))
    return {
        name: efficiency_report(model, work, reference=(size, 1 / losses["dense-total"], 1 / losses[name])).as_dict()
        for name, model in models.items()
    }
