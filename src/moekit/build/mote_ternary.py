"""MoTE: the dense feed-forward layer stays as a shared expert, and ternary experts are trained beside it.

Paper: MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models, 2025 (n 135).
Method: y = FFN(x) + p_i E_i(x), i = argmax of the router (top-1, raw gate); FFN frozen, E_i begin as copies of it;
    W_q = a * clip(round(W / a), -1, 1) with a = mean|W| per matrix and expert; inputs of every expert product rounded
    to 8 bits per token; straight-through gradients for both; loss = LM + gamma * E * sum_e f_e P_e.
Uses: build._upcycle, checkpoint.upcycle, train.parametrise, train.activations, train.distil, formats.PackedBank
Differs: the gate is the router of a stock family that has a shared expert without a gate beside the same attention,
    which is a sigmoid of the chosen logit, not its softmax; text only. Right after upcycling the output is not the
    dense one (a shared expert plus p copies), as in the paper. gamma 0.01 and the learning rate are our choice: the
    paper's full text was not at hand.
Claim: as good as full-precision experts at 1.5B and 3B with 6.8 in place of 18.1 GB of experts; worse at 0.5B.
Shown: lab.experiments.mote_ternary. Adapting to a new domain in 60 steps: 2.60 bits per byte against 2.73 for experts
    rounded afterwards, 2.58 against 2.64 at equal bytes, behind full-precision experts in its place (2.56). Not on text
    the model had already seen (first run: nothing was learnt). Ternary experts had three times the rate of the others,
    which was not tuned: part of the lead at equal bytes may be the rate's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.blocks import blocks
from moekit.build._builder import Builder, Built, Material, check
from moekit.build._dense import dense_layers
from moekit.build._teacher import load_teacher
from moekit.build._upcycle import check_equal, copies, difference, probe_rows, silent_copies, upcycle
from moekit.checkpoint.upcycle import MoEForm
from moekit.formats import DenseBank, PackedBank
from moekit.formats.packed import Codes
from moekit.plan import LayerPlan, Plan
from moekit.plan.values import keep
from moekit.train import Objective, TrainOptions, batches_of, distil
from moekit.train.activations import int8_activations
from moekit.train.forms import Ternary
from moekit.train.parametrise import parametrise, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class MoteTernary(Builder):
    """``ternary`` false trains the same experts at full precision, for comparison. ``kl`` adds the dense model as a
    teacher."""

    experts: int = 4
    steps: int = 200
    learning_rate: float = 1e-3
    balance: float = 0.01
    kl: float = 0.0
    ternary: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.experts >= 2, f"experts={self.experts}: a router needs 2 or more to choose from")
        check(self.steps >= 1, f"steps={self.steps}: ternary experts must be trained")

    def build(self, model: PreTrainedModel, material: Material) -> Built:
        """Upcycle, train routed experts and routers, and put the ternary values in their place. TextError without
        text; UnsupportedModelError where no stock family has the shared expert."""
        material.need_rows(self.name)
        form = self.form(model)
        silent = upcycle(model, form, silent_copies(self.experts), seed=self.seed)
        report: dict[str, object] = {"difference_with_silent_experts": check_equal(model, silent, probe_rows(model))}
        del silent
        student = upcycle(model, form, copies(self.experts), seed=self.seed)
        report["difference_after_upcycling"] = difference(model, student, probe_rows(model))
        report["training"] = self.train(student, load_teacher("self", model) if self.kl else None, material)
        return Built(student, report, export=_ternary_plan if self.ternary else None)

    def train(self, student: PreTrainedModel, teacher: PreTrainedModel | None, material: Material) -> dict[str, float]:
        """Quantisation-aware training of an upcycled model in place; its experts are ternary afterwards."""
        batches = batches_of(material.rows, material.batch_size, self.seed)
        options = TrainOptions(steps=self.steps, learning_rate=self.learning_rate, course="cosine", seed=self.seed)
        objective = Objective(kl=self.kl, lm=1.0, balance=self.balance)
        what = ("router", "experts")
        if not self.ternary:
            return distil(student, teacher, batches, options, objective, what=what, progress=material.progress).last()
        for block in blocks(student):
            parametrise(block, Ternary)
        with int8_activations(student):
            record = distil(student, teacher, batches, options, objective, what=what, progress=material.progress)
        for block in blocks(student):
            settle(block)
        return record.last()

    def form(self, model: PreTrainedModel) -> MoEForm:
        """What a dense model shall become: experts in every layer, one chosen, a shared one beside them."""
        layers = dense_layers(model)
        return MoEForm(
            layers=tuple(ffn.layer for ffn in layers),
            num_experts=self.experts,
            top_k=1,
            intermediate_size=layers[0].intermediate_size,
            normalised=False,
            shared=True,
        )


def two_bits(bank: DenseBank) -> PackedBank:
    """Ternary experts at 2 bits a weight, one grid per row: codes 0, 1, 2 stand for -a, 0 and a. Nothing is rounded.

    The dictionary code of ``formats.TernaryBank`` would need more than 2 bits here: it pays from 82 % zeros on, and
    mean-magnitude rounding leaves about a third. Raises :class:`OptionError` for weights that are not ternary.
    """
    experts = []
    for number in range(bank.num_experts):
        expert = bank.expert(number)
        experts.append({"gate_up": _codes(expert.gate_up), "down": _codes(expert.down)})
    widest = max(bank.hidden_size, bank.intermediate_size)
    return PackedBank.from_codes(experts, 2, widest, dtype=bank.dtype, activation=bank.activation)


def _codes(weight_NK: Tensor) -> Codes:
    level = weight_NK.float().abs().amax(1, keepdim=True)
    check(
        bool(((weight_NK == 0) | (weight_NK.abs() == level)).all()), "these experts are not ternary: train them first"
    )
    return Codes(weight_NK.sign().to(torch.int8) + 1, level, -level)


def _ternary_plan(checkpoint: Checkpoint) -> Plan:
    """Every routed expert of a checkpoint written by this builder at 2 bits."""
    layers = {}
    for layer in checkpoint.moe_layers:
        values = keep(two_bits(checkpoint.bank(layer.name)))
        layers[layer.name] = LayerPlan.identity(layer.num_experts, why="ternary as trained").valued(values)
    return Plan(source=checkpoint.fingerprint, layers=layers, methods=("mote-ternary",))
