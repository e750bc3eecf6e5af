"""Training what decides at run time: small heads fitted to one layer's sample, or all of them through the whole model.

Shapes by suffix: S sampled tokens, N tokens of one expert, K slots, C choices, E experts, W widths, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from moekit.blocks.rewriting import attached
from moekit.compress._sample import WORK_BYTES, Sample, moe_output, output
from moekit.contract import Routing
from moekit.kernels import run
from moekit.kernels.rewrites import BitWidths, PrefixMask, Rewrite, keep_slots, rank_of
from moekit.plan import LiveLoss, Plan, values
from moekit.plan.rewriting import rewrite_of
from moekit.train import Batch, Batches, Record, TrainOptions, losses, train
from moekit.train.sequences import inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.bank import ExpertBank
    from moekit.formats import DenseBank, NestedBank
    from moekit.plan.planner import Source
    from moekit.stream import LoadedModel

STEPS, RIDGE = 100, 1e-4
"""Of fitting to a sample: iterations at most, and what a squared coefficient costs."""
FEW = 16
"""Tokens below which an expert's head is left as it begins."""
COOLEST = 0.3
"""Temperature at the end of training; it falls from 1 in a straight line."""


def fit(head: Rewrite, logits: Callable[[], Tensor], loss_SC: Tensor) -> None:
    """Train a head's parameters to choose what loses least: ``loss_SC`` is what each choice costs each token.

    Cross-entropy to the best choice, each token weighing as much as choosing the worst would cost it: convex, so one
    optimum, found without drawing anything.
    """
    best_S, stake_S = loss_SC.argmin(1), loss_SC.max(1).values - loss_SC.min(1).values
    stake_S = stake_S / stake_S.mean().clamp(min=1e-20)
    parameters = list(head.parameters())
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        lost = (stake_S * cross_entropy(logits(), best_S, reduction="none")).mean()
        lost = lost + RIDGE * torch.stack([p.square().sum() for p in parameters]).sum()
        lost.backward()
        return lost

    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer.step(closure)
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None


def fit_mask(sample: Sample, bank: ExpertBank, price: float, *, renormalise: bool) -> PrefixMask:
    """A head that keeps as many slots as are worth it: one more must lower the squared error of the layer's output by
    ``price / K`` of its mean square."""
    slots, hidden = sample.routing.expert.shape[1], sample.x_SH.shape[1]
    head = PrefixMask(torch.zeros(slots, hidden + slots), torch.zeros(slots), renormalise=renormalise)
    lengths_K = torch.arange(1, slots + 1) / slots
    loss_SK = prefix_errors(sample, bank, renormalise=renormalise) + price * lengths_K
    fit(head, lambda: head.logits(sample.x_SH, sample.routing.weight), loss_SK)
    return head


@torch.no_grad()
def prefix_errors(sample: Sample, bank: ExpertBank, *, renormalise: bool) -> Tensor:
    """[S, K]: squared change of the layer's output where only the 1, 2 ... K heaviest slots run, over the mean square
    of the output."""
    index_SK, weight_SK = sample.routing.expert, sample.routing.weight.float()
    size = max(1, WORK_BYTES // (4 * index_SK.shape[1] * bank.hidden_size))
    errors, energy = [], 0.0
    for x_nH, index_nK, weight_nK in zip(
        sample.x_SH.split(size), index_SK.split(size), weight_SK.split(size), strict=True
    ):
        y_nKH, rank_nK = run(bank, x_nH, Routing(index_nK, weight_nK)), rank_of(weight_nK)
        whole_nH = (weight_nK[..., None] * y_nKH).sum(1)
        energy += float(whole_nH.square().sum())
        found = []
        for count in range(1, index_nK.shape[1] + 1):
            _, kept_nK = keep_slots(index_nK, weight_nK, rank_nK < count, renormalise=renormalise)
            found.append(((kept_nK[..., None] * y_nKH).sum(1) - whole_nH).square().sum(1))
        errors.append(torch.stack(found, 1))
    return torch.cat(errors) / max(energy / len(sample), 1e-20)


def fit_widths(sample: Sample, bank: DenseBank, nested: NestedBank, price: float) -> tuple[BitWidths, tuple[int, ...]]:
    """A head that runs an expert as wide as a token is worth it, and experts with too few tokens to tell (widest).

    One more bit must lower the squared error that this expert adds by ``price`` of the output's mean square.
    """
    widths = tuple(range(nested.base_bits, max(nested.bits) + 1))
    bias_EW = torch.zeros(bank.num_experts, len(widths))
    bias_EW[:, -1] = 2.0
    whole = BitWidths(widths, torch.zeros(bank.num_experts, len(widths), bank.hidden_size), bias_EW)
    energy = float(moe_output(sample, bank).square().sum(1).mean())
    cost_W = price * torch.tensor(widths, dtype=torch.float32)
    levels = [nested.at(width) for width in widths]
    for e in range(bank.num_experts):
        own = sample.own(e)
        if len(own.token_N) < FEW:
            continue
        wanted_NH = output(bank.expert(e), bank.activation, own.x_NH)
        made = [output(level.expert(e), bank.activation, own.x_NH) for level in levels]
        errors = [own.weight_N.square() * (y_NH - wanted_NH).square().sum(1) for y_NH in made]
        head = BitWidths(widths, torch.zeros_like(whole.weight[:1]), torch.zeros_like(whole.bias[:1]))
        fit(head, lambda own=own, head=head: _own_logits(head, own.x_NH), torch.stack(errors, 1) / energy + cost_W)  # type: ignore[misc]
        whole.weight[e], whole.bias[e] = head.weight[0], head.bias[0]
    return whole, sample.starved(FEW)


def _own_logits(head: BitWidths, x_NH: Tensor) -> Tensor:
    return linear(x_NH, head.weight[0], head.bias[0])


def mean_width(head: BitWidths, sample: Sample) -> float:
    """Bits a slot runs at, on average over the sample."""
    chosen = head.choice(sample.x_SH, sample.routing.expert)[sample.routing.expert >= 0]
    return float(torch.tensor(head.widths, dtype=torch.float32)[chosen].mean())


def train_heads(
    plan: Plan,
    runner: LoadedModel,
    source: Source,
    teacher: PreTrainedModel,
    batches: Batches,
    options: TrainOptions,
    *,
    price: float,
) -> tuple[Plan, Record]:
    """The plan with its :class:`PrefixMask` heads trained end to end: KL(teacher || masked) + ``price`` times the
    share of slots that run, expected, mean over layers. The runner's model computes as the plan's output would
    meanwhile and is as it was afterwards; only heads learn. Deterministic under ``options.seed``.
    """
    model = runner.model
    heads = {name: head for name, layer in plan.layers.items() if isinstance(head := _head(layer, model), PrefixMask)}
    bare = replace(plan, layers={name: replace(layer, rewrite=None) for name, layer in plan.layers.items()})
    live = LiveLoss(runner, source, [np.zeros(2, dtype=np.int64)])

    def loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            known = teacher(**inputs(batch), use_cache=False).logits
        kl = losses.kl(model(**inputs(batch), use_cache=False).logits, known, batch)
        cost = torch.stack([head.cost for head in heads.values()]).mean()
        return kl + price * cost, {"kl": kl, "kept": cost}

    def cooler(step: int) -> None:
        for head in heads.values():
            head.temperature = 1 - (1 - COOLEST) * step / options.steps

    live.become(bare)
    try:
        with attached(model, heads):
            record = train(model, loss, batches, options, what=["*.rewrite.*"], after_step=cooler)
    finally:
        live.restore()
    made = {name: values.keep_rewrite(head.describe(), head.state_dict()) for name, head in heads.items()}
    layers = {n: replace(layer, rewrite=made.get(n, layer.rewrite)) for n, layer in plan.layers.items()}
    return replace(plan, layers=layers), record


def _head(layer: Any, model: Any) -> Rewrite | None:
    return rewrite_of(layer, model.config.get_text_config().hidden_size)
