"""What experiments with a short recovery share: a plan's experts trained towards the source, as a plan again.

The student is the model in memory with the plan's experts in it. Only experts are trained, in the form the plan stores
them in; so what training made is computed values of the same plan, and is judged by the same ruler as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch

from moekit import lab
from moekit.bank import ExpertBank
from moekit.blocks import MoEBlock, blocks
from moekit.formats import DenseBank
from moekit.lab.experiments._trial import Trial
from moekit.measure import windows
from moekit.plan import LayerPlan, LiveLoss, Plan, values
from moekit.stream import LoadedModel
from moekit.train import Batches, Objective, TrainOptions, batches_of, distil
from moekit.train.forms import Tied
from moekit.train.parametrise import held, parametrise

LENGTH, ROWS, RATE = 128, 4, 1e-3
"""Tokens per row, rows per step, learning rate; every contestant of every experiment has the same."""
BYTES = 8192
"""Text per domain, of the calibration split."""

Hold = Callable[[MoEBlock, LayerPlan], None]
Read = Callable[[MoEBlock, torch.dtype], ExpertBank]


def recovered(
    trial: Trial,
    plan: Plan,
    seed: int,
    steps: int,
    hold: Hold,
    read: Read,
    pruning: Callable[[Sequence[MoEBlock]], Callable[[int], None]] | None = None,
) -> Plan:
    """``plan`` after ``steps`` of distillation (KL to the source) of its experts alone.

    ``hold`` brings a block's experts into the form to be trained, ``read`` makes a bank of what was trained, and
    ``pruning`` makes what is told after each step. Values that the plan had computed are replaced.
    """
    student = deepcopy(trial.runner.model)
    LiveLoss(LoadedModel(student), trial.source, [np.zeros(2, dtype=np.int64)]).become(plan)
    live = blocks(student)
    for block in live:
        hold(block, plan.layers[block.name])
    options = TrainOptions(steps=steps, learning_rate=RATE, course="linear", seed=seed)
    after = None if pruning is None else pruning(live)
    distil(student, trial.runner.model, text(trial, seed), options, Objective(), what=("experts",), after_step=after)
    dtype = trial.source.bank(live[0].name).dtype
    made = {block.name: values.keep(read(block, dtype)) for block in live}
    return replace(plan, layers={name: replace(layer, values=made[name]) for name, layer in plan.layers.items()})


def text(trial: Trial, seed: int) -> Batches:
    """The same batches for every contestant of a seed: all domains of the trial, in a drawn order."""
    texts = [lab.text(domain, "calibration", BYTES, seed) for domain in trial.domains]
    found = windows(texts, trial.tokenizer, length=LENGTH, batch_size=1)
    return batches_of([batch["input_ids"][0] for batch in found.batches], ROWS, seed)


def hold_tied(block: MoEBlock, plan: LayerPlan) -> None:
    """Plain weights, those of rows that share an expert as one."""
    parametrise(block, lambda: Tied(plan.slots))


def read_tied(block: MoEBlock, dtype: torch.dtype) -> DenseBank:
    """The stored experts that :func:`hold_tied` trained."""
    found = {part: tensors[0].detach().to(dtype) for part, _, tensors in held(block)}
    first = [found[part] for part in ("gate", "up") if part in found]
    return DenseBank(torch.cat(first, dim=1), found["down"], activation=block.bank().activation)
