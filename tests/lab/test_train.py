"""Training: the experts loop, the balance term, batches, resumption, publication."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit import lab
from moekit.lab import train_mini
from moekit.lab._batches import Batches, task_row
from moekit.lab._evaluate import evaluate, expert_counts, mutual_information
from moekit.lab._loss import load_and_balance, training_loss
from moekit.lab._publish import publish
from moekit.lab._recipe import RECIPES, Phase, Recipe
from moekit.lab._replicas import Replicas

TINY = Recipe(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    num_experts=4,
    top_k=2,
    intermediate_size=8,
    steps=4,
    tokens_per_step=128,
    context=32,
    long_context=64,
    long_share=0.5,
    warmup=2,
    phases=(
        Phase(start=0, balance=0.01, mixture={"licences": 0.5, "arithmetic": 0.3, "facts": 0.2}),
        Phase(start=2, balance=0.0, mixture={"arithmetic": 1.0}),
    ),
)


def test_sorted_experts_equal_eager_with_gradients() -> None:
    model = train_mini.build(TINY)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    results = []
    for implementation in ("eager", "moekit_lab_sorted"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-6)


def test_balance_is_one_when_even_and_experts_over_k_when_collapsed() -> None:
    even = torch.full((8, 4), -20.0)
    even[torch.arange(8), torch.arange(8) % 4] = 20.0
    even[torch.arange(8), (torch.arange(8) + 1) % 4] = 20.0
    load, term = load_and_balance(even, top_k=2)
    torch.testing.assert_close(load, torch.full((4,), 0.25))
    assert term.item() == pytest.approx(1.0)
    collapsed = torch.tensor([[20.0, 20.0, -20.0, -20.0]]).expand(8, 4)
    assert load_and_balance(collapsed, top_k=2)[1].item() == pytest.approx(2.0)


def test_loss_counts_only_weighted_bytes() -> None:
    model = train_mini.build(TINY)
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
    weight = torch.zeros(2, 16)
    weight[0, 3] = 2.0
    _, figures = training_loss(model, ids, weight, 0.0)
    logits = model(input_ids=ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 3], ids[0, 4])
    assert figures["loss"] == pytest.approx(2 * expected.item(), rel=1e-4)


def test_two_halves_give_the_gradient_of_the_whole() -> None:
    model = train_mini.build(TINY)
    ids, weight = Batches(TINY).batch(0)
    loss, whole = training_loss(model, ids, weight / weight.sum(), 0.0)
    loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    halves = Replicas(model).backward(ids, weight, 0.0)
    assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert halves["balance"] == pytest.approx(whole["balance"], rel=0.2)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_batches_replay_and_hold_the_tokens_they_should() -> None:
    first, again = Batches(TINY), Batches(TINY)
    for step, context in ((0, 32), (3, 64)):
        ids, weight = first.batch(step)
        assert ids.shape == (128 // context, context + 1)
        assert weight.shape == (128 // context, context)
        assert torch.equal(ids, again.batch(step)[0])
    assert not torch.equal(first.batch(0)[0], first.batch(1)[0])


def test_answers_weigh_one_and_prompts_less() -> None:
    row, weight = task_row("reversing", "train", 5, 60, 0.2)
    line = row.split(b"\n")[0]
    split = line.index(b"=") + 1
    assert weight[:split] == [0.2] * split
    assert weight[split : len(line) + 1] == [1.0] * (len(line) + 1 - split)


def test_unaligned_rows_are_aligned_rows_from_further_on() -> None:
    whole, weight = task_row("arithmetic", "train", 5, 200, 0.2)
    row, part = task_row("arithmetic", "train", 5, 100, 0.2, unaligned=1.0)
    skip = whole.index(row)
    assert 0 < skip < 64
    assert part == weight[skip : skip + 100]
    assert task_row("arithmetic", "train", 5, 100, 0.2, unaligned=0.0)[0] == whole[:100]


def test_schedule_warms_up_holds_and_decays() -> None:
    recipe = replace(TINY, steps=1000, warmup=100, decay_share=0.25)
    assert recipe.rate(0) == pytest.approx(recipe.learning_rate / 100)
    assert recipe.rate(99) == recipe.rate(749) == recipe.learning_rate
    assert recipe.rate(875) == pytest.approx(recipe.learning_rate / 2)
    assert 0 < recipe.rate(999) < recipe.learning_rate / 100


def test_a_resumed_training_ends_where_an_undisturbed_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_mini, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_mini, "LOG_EVERY", 1)
    whole = train_mini.train(TINY, tmp_path / "whole")
    rate = Recipe.rate

    def dies(recipe: Recipe, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return rate(recipe, step)

    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "rate", dies)
        with pytest.raises(KeyboardInterrupt):
            train_mini.train(TINY, tmp_path / "cut")
    resumed = train_mini.train(TINY, tmp_path / "cut")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    starts = [json.loads(line) for line in (tmp_path / "cut" / train_mini.LOG).read_text().splitlines()]
    assert [line["start"] for line in starts if "start" in line] == [0, 2]


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_publication_loads_in_stock_classes(kind: str, tmp_path: Path) -> None:
    recipe = replace(TINY, kind=kind)
    model = train_mini.build(recipe)
    log = tmp_path / "log"
    log.write_text("{}\n")
    figures = publish(model, recipe, tmp_path / "model", log=log, max_bytes=256, examples=4)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert stock.dtype == torch.bfloat16
    assert type(stock).__name__ == {"moe": "Qwen3MoeForCausalLM", "dense": "Qwen3ForCausalLM"}[kind]
    for name, parameter in model.named_parameters():
        assert torch.equal(stock.get_parameter(name), parameter), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab")["input_ids"] == [97, 98]
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("## Experts" in card) == (kind == "moe")
    assert f"| sorting | {figures['bits_per_byte']['sorting']:.3f} |" in card


def test_figures_of_an_untrained_model_are_those_of_guessing() -> None:
    model = train_mini.build(TINY)
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = evaluate(model, context=32, max_bytes=128, examples=3)
    assert model.training
    assert set(figures["bits_per_byte"]) == set(lab.DOMAINS)
    assert set(figures["bits_per_byte"].values()) == {round(float(np.log2(264)), 3)}
    assert set(figures["exact_match"].values()) == {0.0}
    experts = figures["experts"]
    assert all(0 <= bits <= np.log2(4) for bits in experts["mutual_information_bits"])
    assert all(low <= 1 <= high for low, high in zip(experts["min_load"], experts["max_load"], strict=True))


def test_expert_counts_count_every_slot() -> None:
    counts = expert_counts(train_mini.build(TINY), b"abcd" * 40, 32)
    assert counts.shape == (TINY.num_layers, TINY.num_experts)
    assert (counts.sum(1) == 160 * TINY.top_k).all()


def test_mutual_information_from_none_to_all() -> None:
    assert mutual_information(np.full((4, 4), 7)) == pytest.approx(0.0)
    assert mutual_information(np.eye(4) * 9) == pytest.approx(2.0)
    assert mutual_information(np.array([[2, 2, 0, 0], [0, 0, 3, 3]])) == pytest.approx(1.0)


def test_the_mixture_names_every_domain_once() -> None:
    for phase in [phase for recipe in RECIPES.values() for phase in recipe.phases]:
        assert set(phase.mixture) == set(lab.DOMAINS)
        assert sum(phase.mixture.values()) == pytest.approx(1.0)


def test_phases_follow_each_other() -> None:
    assert [TINY.phase_at(step).start for step in range(4)] == [0, 0, 2, 2]
    ids, _ = Batches(TINY).batch(3)
    assert all(b"add: " in bytes(row.tolist()) or b"sub: " in bytes(row.tolist()) for row in ids)
