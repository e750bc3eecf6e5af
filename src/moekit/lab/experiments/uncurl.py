"""UNCURL (n 52): is a large mixture halved for a task as good as a small one trained from nothing?

Setting: small models of the embedded model's kind (3 layers, hidden size 96, experts of width 48, top-2) with 16 and
with 8 experts, trained from nothing on the embedded models' mixture for the same 200 steps of 512 tokens. The task is
Python text: UNCURL clusters the 16 experts on its calibration split, and every contestant is then fine-tuned on that
split alike (all parameters, 30 steps of 512 tokens, the same batches). Judged in bits per byte on 4 KB of the test
split. Contestants with 8 experts: UNCURL 16 to 8 (all 16 router rows stay), frequency pruning 16 to 8, and the model
trained with 8. Seeds vary weights, batches and text.

Rule, written before the first run. `shown` if and only if, after fine-tuning, the mean over seeds of (trained with 8
minus UNCURL 16 to 8) is not below zero, and the 95 % t interval over seeds of (frequency minus UNCURL) lies above zero.
UNCURL losing to the small model at equal fine-tuning falsifies the claim. Factors 4 and 8, the unpruned 16 and all
losses before fine-tuning are reported and decide nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moekit import lab
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._recovering import hold_tied
from moekit.lab.experiments._trial import by_method
from moekit.measure import bits_per_byte, windows
from moekit.plan import LiveLoss
from moekit.profile import profile
from moekit.stream import LoadedModel
from moekit.train import Objective, TrainOptions, batches_of, distil

LARGE, SMALL, TOP, LENGTH, TOKENS = 16, 8, 2, 128, 512
PRETRAIN, TUNE = (200, 3e-3), (30, 1e-3)
"""Steps and learning rate."""
TASK, CALIBRATION, TEST = "python", 16384, 4096
OURS, SCRATCH, FREQUENCY = "uncurl 16 to 8", "trained with 8", "frequency 16 to 8"
PLANS = {
    OURS: "uncurl:keep=8",
    FREQUENCY: "frequency:keep=8",
    "uncurl 16 to 4": "uncurl:keep=4",
    "uncurl 16 to 2": "uncurl:keep=2",
}
SIZES = {
    "hidden_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 24,
    "num_experts_per_tok": TOP,
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return bits per byte of the task by contestant, before and after fine-tuning. ``text`` is not used."""
    losses: dict[str, dict[str, list[float]]] = {"before": {}, "tuned": {}}
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        task = Task(seed)
        large, small = (task.trained(experts) for experts in (LARGE, SMALL))
        task.judge(losses, SCRATCH, small)
        with tempfile.TemporaryDirectory() as folder:
            large.save_pretrained(folder)
            task.tokenizer.save_pretrained(folder)
            source = Checkpoint.open(folder)
            runner = LoadedModel.load(source, dtype=torch.float32)
            texts = {TASK: [task.calibration]}
            seen = profile(runner, texts, sequence_length=LENGTH, tokenizer=task.tokenizer, seed=seed, sample=0)
            for name, spec in PLANS.items():
                model = LoadedModel.load(source, dtype=torch.float32).model
                plan = method(spec).plan(seen, source)
                LiveLoss(LoadedModel(model), source, [np.zeros(2, dtype=np.int64)]).become(plan)
                if "uncurl" in name:
                    for block in blocks(model):
                        hold_tied(block, plan.layers[block.name])
                task.judge(losses, name, model)
            task.judge(losses, "all 16", large)
    figures = {when: by_method(found, OURS) for when, found in losses.items()}
    setting = {"sizes": SIZES, "pretraining": PRETRAIN, "tuning": TUNE, "task": TASK}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    tuned = figures["tuned"]
    return bool(tuned[SCRATCH]["gap"]["mean"] >= 0 and tuned[FREQUENCY]["gap"]["low"] > 0)


class Task:
    """One seed's texts and batches."""

    def __init__(self, seed: int) -> None:
        self.seed, self.tokenizer = seed, Checkpoint.open("moekit:mini").tokenizer()
        self.calibration = lab.text(TASK, "calibration", CALIBRATION, seed)
        self._test = [lab.text(TASK, "test", TEST, seed)]
        found = windows([self.calibration], self.tokenizer, length=LENGTH, batch_size=1)
        self._batches = batches_of([batch["input_ids"][0] for batch in found.batches], TOKENS // LENGTH, seed)

    def trained(self, experts: int) -> Any:
        """A model with so many experts after the mixture, which is the same for all."""
        torch.manual_seed(self.seed)
        config = AutoConfig.from_pretrained(lab.mini(), num_experts=experts, **SIZES)
        model = AutoModelForCausalLM.from_config(config).float()
        steps, rate = PRETRAIN
        options = TrainOptions(steps=steps, learning_rate=rate, course="cosine", seed=self.seed)
        distil(model, None, lab.mixture(self.seed, TOKENS, LENGTH), options, Objective(kl=0.0, lm=1.0, balance=0.01))
        return model.eval()

    def judge(self, losses: dict[str, dict[str, list[float]]], name: str, model: Any) -> None:
        """Note the loss of a model, fine-tune it, note the loss again."""
        losses["before"].setdefault(name, []).append(self._loss(model))
        steps, rate = TUNE
        options = TrainOptions(steps=steps, learning_rate=rate, seed=self.seed)
        distil(model, None, self._batches, options, Objective(kl=0.0, lm=1.0))
        losses["tuned"].setdefault(name, []).append(self._loss(model.eval()))

    def _loss(self, model: Any) -> float:
        found = bits_per_byte(LoadedModel(model), {TASK: self._test}, self.tokenizer, length=LENGTH, batch_size=16)
        return found[TASK].mean
