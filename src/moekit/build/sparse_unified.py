"""Sparse unified: a dense feed-forward layer is cut into experts by its hidden units, about half of them per token.

Paper: Understanding and Harnessing Sparsity in Unified Multimodal Models, 2025 (n 76).
Method: units ranked by mean |h_j mean_i W_down[i, j]|; the first share to a shared expert, the rest dealt in snake
    order to E experts; r = x W_r^T, top-k by r, y = sum (1 + r_i) E_i(x) + (1 + g(x)) E_shared(x), no softmax: with
    all experts and zero routers the dense layer exactly. Router alone is tuned first, then router and experts.
Uses: build._split, build._upcycle, checkpoint.upcycle, train.distil, kernels.rewrites
Differs: text only. A zero router under k < E would always choose the same k experts and never train the others, so it
    begins with tiny noise. Loss (LM, optionally KL to the dense model), steps and rates are ours: the paper's were
    not read. Tuning all trains the split layers, not the attention.
Claim: with about half of the parameters active the adapted model is close to the full one.
Shown: lab.experiments.sparse_unified. Not here: in 80 steps of 512 tokens routers go two thirds of the way from
    untrained slices to the best fixed half of the units, and stay 0.03 bits per byte behind it (0.06 when both are
    tuned). Snake order makes the slices equally good on purpose: routing begins at an average half, not at the best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.blocks import blocks
from moekit.build._builder import Builder, Built, Material, check
from moekit.build._dense import DenseFFN, dense_layers, part
from moekit.build._split import SplitFFN, replace_layer, snake, unit_scores
from moekit.build._teacher import load_teacher
from moekit.build._upcycle import difference, probe_rows, upcycle
from moekit.checkpoint.upcycle import MoEForm
from moekit.errors import MoekitError
from moekit.kernels.rewrites import ResidualGate
from moekit.plan import LayerPlan, Plan
from moekit.plan.values import keep_rewrite
from moekit.train import Objective, TrainOptions, batches_of, distil

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.checkpoint import Checkpoint

_NO_STOCK = "its experts are weighted by 1 + logit, which no stock router does"


@dataclass(frozen=True, kw_only=True)
class SparseUnified(Builder):
    """``shared`` is the share of hidden units every token uses; ``ends`` false splits the first and last layer too.

    ``frozen_steps`` tune the router alone, ``steps`` router and experts; 0 leaves a stage out. ``kl`` weighs the
    divergence from the dense model, ``lm`` the loss on text.
    """

    experts: int = 32
    top_k: int = 16
    shared: float = 0.0
    ends: bool = True
    norm: bool = False
    frozen_steps: int = 100
    steps: int = 100
    router_rate: float = 1e-2
    learning_rate: float = 1e-3
    lm: float = 1.0
    kl: float = 0.0
    noise: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check(1 <= self.top_k <= self.experts, f"top_k={self.top_k} of {self.experts} experts is not possible")
        check(0 <= self.shared < 1, f"shared={self.shared:g} is a share of the hidden units: give 0 to below 1")
        check(min(self.steps, self.frozen_steps) >= 0, "steps cannot be negative: 0 leaves a stage out")

    def build(self, model: PreTrainedModel, material: Material) -> Built:
        """Split, tune the router, tune all. TextError without text, OptionError where units cannot be dealt evenly."""
        rows = material.need_rows(self.name)
        teacher = load_teacher("self", model) if self.kl else None
        layers = dense_layers(model)
        chosen = layers if not self.ends else layers[1:-1]
        check(bool(chosen), f"the model has {len(layers)} layers, of which ends=true keeps the outer two: ends=false")
        carrier = self._carrier(model, chosen)
        before = load_teacher("self", model)
        names = self.split(model, chosen, rows)
        report: dict[str, object] = {"difference_after_splitting": difference(before, model, probe_rows(model))}
        del before
        batches = batches_of(rows, material.batch_size, self.seed)
        objective = Objective(kl=self.kl, lm=self.lm)
        stages = {
            "router": (self.frozen_steps, self.router_rate, [f"{name}.router.*" for name in names]),
            "all": (self.steps, self.learning_rate, [f"{name}.*" for name in names]),
        }
        for stage, (steps, rate, what) in stages.items():
            if steps:
                options = TrainOptions(steps=steps, learning_rate=rate, course="cosine", seed=self.seed)
                record = distil(model, teacher, batches, options, objective, what=what, progress=material.progress)
                report[stage] = record.last()
        return self._built(model, names, carrier, report)

    def split(self, model: PreTrainedModel, layers: list[DenseFFN], rows: object) -> list[str]:
        """Put :class:`SplitFFN` in the place of the layers; returns their names."""
        scores = unit_scores(model, layers, rows, norm=self.norm)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed)
        for ffn, score in zip(layers, scores, strict=True):
            shared, units = snake(score, self.experts, self._shared_units(ffn))
            std = self.noise if self.top_k < self.experts else 0.0
            noise = torch.randn(self.experts, ffn.weights.down.shape[0], generator=generator) * std
            replace_layer(model, ffn.name, SplitFFN(ffn, units, shared, self.top_k, noise))
        return [ffn.name for ffn in layers]

    def _shared_units(self, ffn: DenseFFN) -> int:
        """As near to the share as leaves the same number of units to every expert; none where none is asked for."""
        total = ffn.intermediate_size
        if not self.shared:
            return 0
        return total - round(total * (1 - self.shared) / self.experts) * self.experts

    def _carrier(self, model: PreTrainedModel, layers: list[DenseFFN]) -> PreTrainedModel | str:
        """A stock model with as many experts of the same sizes, or why there is none."""
        if self.shared:
            return "a shared slice with a gate of its own has no place in a stock checkpoint"
        width = layers[0].intermediate_size // self.experts
        form = MoEForm(
            layers=tuple(ffn.layer for ffn in layers),
            num_experts=self.experts,
            top_k=self.top_k,
            intermediate_size=width,
        )
        units = torch.arange(width * self.experts).view(self.experts, width)
        try:
            return upcycle(model, form, lambda ffn: [part(ffn.weights, own) for own in units], seed=self.seed)
        except MoekitError as error:
            return str(error)

    def _built(
        self, model: PreTrainedModel, names: list[str], carrier: PreTrainedModel | str, report: dict[str, object]
    ) -> Built:
        if isinstance(carrier, str):
            return Built(model, report, no_stock=f"{_NO_STOCK}; and moekit's own format cannot hold it: {carrier}")
        split = {name: model.get_submodule(name) for name in names}
        found = {block.layer: block for block in blocks(carrier)}
        gates: dict[str, Tensor] = {}
        for name, module in split.items():
            assert isinstance(module, SplitFFN)
            block = found[next(int(p) for p in name.split(".") if p.isdigit())]
            block.put(replace(module.bank(), activation=block.bank().activation))
            gates[block.name] = module.router.weight.detach().cpu()

        def export(checkpoint: Checkpoint) -> Plan:
            layers = {}
            for layer in checkpoint.moe_layers:
                gate = ResidualGate(gates[layer.name], self.top_k)
                rewrite = keep_rewrite(gate.describe(), gate.state_dict())
                layers[layer.name] = replace(LayerPlan.identity(layer.num_experts, why=_NO_STOCK), rewrite=rewrite)
            return Plan(source=checkpoint.fingerprint, layers=layers, methods=(self.spec,))

        return Built(model, report, no_stock=_NO_STOCK, carrier=carrier, export=export)
