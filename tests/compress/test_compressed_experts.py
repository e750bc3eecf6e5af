"""Compressed experts: before training exactly the top half of the slots, afterwards better than those."""

from __future__ import annotations

import pytest
import torch

import families
from moekit.blocks import blocks
from moekit.blocks.rewriting import attached
from moekit.compress import method
from moekit.errors import OptionError
from moekit.kernels.rewrites import AuxiliaryVectors, TopSlots
from moekit.plan.rewriting import rewrite_of
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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("compressed-experts:main=-1", r"compressed-experts: main=-1 cannot be negative \(0 is half of the slots\)"),
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
