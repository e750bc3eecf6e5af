"""Compressed experts: before training exactly the top half of the slots, afterwards better than those.

Shapes by suffix: T tokens, K slots, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import families
from moekit.blocks import blocks
from moekit.blocks.rewriting import attach, attached
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._skip import routed
from moekit.errors import OptionError, PlanError, UnsupportedModelError
from moekit.formats import PackedBank
from moekit.kernels import BankExperts
from moekit.kernels.rewrites import AuxiliaryVectors, ProjectionVectors, Rewrite, TopSlots
from moekit.measure import compare
from moekit.plan import LayerPlan, LiveLoss, Plan
from moekit.plan.rewriting import rewrite_of
from moekit.stream import LoadedModel
from moekit.train import Objective, TrainOptions, batches_of, distil

NAME = "model.layers.0.mlp"


def test_the_plan_is_half_of_the_slots_until_it_is_trained(model, profile) -> None:
    plan = method("compressed-experts").plan(profile, model).layers[NAME]
    rewrite = rewrite_of(plan, 6)
    assert isinstance(rewrite, AuxiliaryVectors)
    assert rewrite.main == 1
    assert torch.equal(rewrite.theta, torch.ones(8, 6))
    assert plan.values is None
    assert rewrite_of(method("compressed-experts:main=2").plan(profile, model).layers[NAME], 6).main == 2
    assert not rewrite.renormalise  # the weights of this profile add up to anything


def test_a_model_with_untrained_vectors_is_the_model_with_fewer_slots() -> None:
    built, inputs = families.build("qwen3_moe")
    with torch.no_grad():
        found = {}
        for name, make in (
            ("ones", lambda n, h: AuxiliaryVectors(torch.ones(n, h), 1)),
            ("top", lambda *_: TopSlots(1)),
        ):
            with attached(built, {b.name: make(b.num_experts, b.hidden_size) for b in blocks(built)}):
                found[name] = built(**inputs).logits
        whole = built(**inputs).logits
    assert torch.equal(found["ones"], found["top"])
    assert not torch.equal(found["ones"], whole)
    assert not any("rewrite" in name for name, _ in built.named_parameters())


def test_vectors_learn_with_the_model() -> None:
    built, _ = families.build("qwen3_moe")
    vectors = {b.name: AuxiliaryVectors(torch.ones(b.num_experts, b.hidden_size), 1) for b in blocks(built)}
    rows = [torch.arange(3 + i, 27 + i) for i in range(6)]
    options = TrainOptions(steps=4, learning_rate=0.01)
    with attached(built, vectors):
        record = distil(built, None, batches_of(rows, 3), options, Objective(kl=0, lm=1), what=["all"])
    assert {f"{name}.experts.rewrite.theta" for name in vectors} < set(record.trained)
    assert all((one.theta != 1).any() for one in vectors.values())
    assert record.losses[-1] < record.losses[0]


def projections(block: Any, main: int = 1, seed: int = 0) -> ProjectionVectors:
    """Vectors far enough from ones to show."""
    draw = torch.Generator().manual_seed(seed)
    sizes = (block.hidden_size, block.hidden_size, block.bank().intermediate_size)
    vectors = (1 + 0.5 * torch.randn(block.num_experts, size, generator=draw) for size in sizes)
    return ProjectionVectors(*vectors, main)


def by_hand(block: Any, rewrite: ProjectionVectors, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The equation, token by token: the paper's sums as they are written."""
    bank, out_TH = block.bank(), torch.zeros_like(x_TH)
    for t, x in enumerate(x_TH):
        order = weight_TK[t].argsort(descending=True, stable=True)
        main, auxiliary = order[: rewrite.main], order[rewrite.main :]
        share = weight_TK[t, auxiliary] / weight_TK[t, auxiliary].sum()
        gate, up, down = (share @ theta[index_TK[t, auxiliary]] for theta in (rewrite.gate, rewrite.up, rewrite.down))
        for k in main:
            expert = bank.expert(int(index_TK[t, k]))
            inner = expert.down.shape[1]
            bias = torch.zeros(2 * inner) if expert.gate_up_bias is None else expert.gate_up_bias
            z = torch.cat([expert.gate_up[:inner] @ (x * gate), expert.gate_up[inner:] @ (x * up)]) + bias
            made = expert.down @ (bank.activation(z[None])[0] * down)
            made = made if expert.down_bias is None else made + expert.down_bias
            weight = weight_TK[t, k] * weight_TK[t].sum() / weight_TK[t, main].sum()
            out_TH[t] += weight * made
    return out_TH


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_vectors_at_every_projection_compute_the_equation(family: str) -> None:
    """The second has biases, and gate and up rows that alternate."""
    built, _ = families.build(family)
    block = blocks(built)[0]
    rewrite = projections(block)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, block.hidden_size, generator=draw)
    index = torch.rand(9, block.num_experts, generator=draw).argsort(1)[:, :3]
    weight = torch.rand(9, 3, generator=draw)
    with torch.no_grad(), attached(built, {block.name: rewrite}):
        found = block.experts(x, index, weight)
    with torch.no_grad():
        torch.testing.assert_close(found, by_hand(block, rewrite, x, index, weight), atol=1e-5, rtol=1e-4)


def test_one_vector_for_all_is_a_vector_on_the_input() -> None:
    built, inputs = families.build("qwen3_moe")
    found = []
    with torch.no_grad():
        for kind in ("hidden", "projections", "ones", "top"):
            made: dict[str, Rewrite] = {}
            for block in blocks(built):
                inner, theta = block.bank().intermediate_size, projections(block).gate.data
                ones = torch.ones(block.num_experts, inner)
                made[block.name] = {
                    "hidden": AuxiliaryVectors(theta, 1),
                    "projections": ProjectionVectors(theta, theta, ones, 1),
                    "ones": ProjectionVectors.ones(block.num_experts, block.hidden_size, inner, 1),
                    "top": TopSlots(1),
                }[kind]
            with attached(built, made):
                found.append(built(**inputs).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], found[3], atol=1e-5, rtol=1e-4)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_only_vectors_of_experts_that_stood_in_learn() -> None:
    built, _ = families.build("qwen3_moe")
    block = blocks(built)[0]
    rewrite = projections(block).requires_grad_(True)
    index, weight = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    with attached(built, {block.name: rewrite}):
        block.experts(torch.randn(2, block.hidden_size), index, weight).square().sum().backward()
    for theta in (rewrite.gate, rewrite.up, rewrite.down):
        assert theta.grad is not None
        assert theta.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 2]  # the lighter slot of each token
    used = [p for p in block.experts.parameters() if p.grad is not None and p.dim() == 3]
    assert used
    assert all(p.grad[e].abs().sum() == 0 for p in used for e in (1, 2))
    assert all(p.grad[e].abs().sum() > 0 for p in used for e in (0, 3))


def test_what_is_measured_live_is_what_the_output_computes(tmp_path: Path) -> None:
    families.build("qwen3_moe")[0].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    runner, model = (LoadedModel.load(source, dtype=torch.float32) for _ in range(2))
    layers = {}
    for block in blocks(model.model):
        rewrite = projections(block)
        layers[block.name] = routed(LayerPlan.identity(block.num_experts), rewrite, "")
        stored = PackedBank.quantise(source.bank(block.name), 16)
        model.model.get_submodule(block.name).experts = BankExperts(stored, rewrite=rewrite).eval()
    rows = [np.arange(3 + i, 43 + i) for i in range(4)]
    live = LiveLoss(runner, source, rows)
    measured = live(Plan(source=source.fingerprint, layers=layers))
    live.restore()
    batches = [{"input_ids": torch.from_numpy(row)[None]} for row in rows]
    assert measured > 1e-4
    assert measured == pytest.approx(compare(runner, model, batches).kl.mean, rel=1e-3)
    with pytest.raises(UnsupportedModelError, match=r"scaled apart \(projection-vectors\) cannot be paged"):
        blocks(model.model)[0].experts.arriving(stored)


def test_a_plan_with_vectors_at_every_projection(model, profile) -> None:
    plan = method("compressed-experts:where=projections").plan(profile, model).layers[NAME]
    rewrite = rewrite_of(plan, 6)
    assert isinstance(rewrite, ProjectionVectors)
    assert [tuple(theta.shape) for theta in (rewrite.gate, rewrite.up, rewrite.down)] == [(8, 6), (8, 6), (8, 4)]
    assert all(bool((theta == 1).all()) for theta in rewrite.parameters())
    assert "rescale what every matrix reads" in plan.why


def test_experts_that_weigh_their_inputs_are_refused() -> None:
    block = blocks(families.build("llama4")[0])[0]
    with pytest.raises(PlanError, match="weighs what its experts read, which projection-vectors cannot follow"):
        attach(projections(block), block)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("compressed-experts:main=-1", r"compressed-experts: main=-1 cannot be negative \(0 is half of the slots\)"),
        ("compressed-experts:where=gate", "compressed-experts.*where.*hidden"),
        ("compressed-experts:main=3", "compressed-experts: main=3 of 2 slots is not possible"),
    ],
)
def test_what_is_refused(spec: str, message: str, model, profile) -> None:
    with pytest.raises(OptionError, match=message):
        method(spec).plan(profile, model)


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_slots_that_do_not_run_add_nothing_in_any_stock_kernel(kernel: str) -> None:
    built, inputs = families.build("qwen3_moe")
    found, slopes = [], []
    for name in ("eager", kernel):
        built.set_experts_implementation(name)
        built.zero_grad()
        with attached(built, {b.name: TopSlots(1) for b in blocks(built)}):
            logits = built(**inputs).logits
            logits.square().mean().backward()
        found.append(logits.detach())
        slopes.append(built.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-5, rtol=1e-3)
