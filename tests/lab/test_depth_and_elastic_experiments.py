"""Experiments on depth, candidates and schedules: contestants can be built, rules decide, probes measure."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moekit.contract import PAD, Context
from moekit.lab.experiments import (
    _league,
    _probing,
    chain_of_experts,
    deepseek_moe,
    ernie5_elastic,
    evomoe,
    momentum_smoe,
    rexmoe,
    sigma_moe_tiny,
    smoe_dropout,
    sortednet,
)
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.nn.config import Site
from moekit.nn.schedule import Schedule
from moekit.nn.selectors import TopK

MODULES = {
    module.KEY: module
    for module in (
        chain_of_experts,
        deepseek_moe,
        ernie5_elastic,
        evomoe,
        momentum_smoe,
        rexmoe,
        sigma_moe_tiny,
        smoe_dropout,
        sortednet,
    )
}


def interval(low: float) -> dict[str, float]:
    return {"mean": low + 0.01, "low": low, "high": low + 0.02}


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 16, "moe_intermediate_size": 4, "num_experts": 16}
    layers = {"num_hidden_layers": 6, "num_attention_heads": 2, "num_experts_per_tok": 4}
    return MoekitForCausalLM(MoekitConfig(**sizes, **layers, **options)).eval()


@pytest.fixture(autouse=True)
def little_text(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (_league, momentum_smoe):
        monkeypatch.setattr(module, "TEST_BYTES", 256)


@pytest.mark.parametrize("key", sorted(MODULES))
def test_contestants_fit_together(key):
    for recipe in MODULES[key].arms().values():
        model = recipe.build()
        for entry in recipe.schedule:
            Schedule(model, entry["set"], entry["course"])


@pytest.mark.parametrize(
    ("module", "names", "spoiled"),
    [
        (deepseek_moe, ("coarse - fine", "base - shared"), "base - shared"),
        (momentum_smoe, ("base", "swapped", "gain"), "gain"),
        (sigma_moe_tiny, ("least load", "bits_per_byte"), "least load"),
    ],
)
def test_rules_that_want_every_interval_above_zero(module, names, spoiled):
    gaps = {name: interval(0.1) for name in names}
    assert module.holds(gaps)
    assert not module.holds(gaps | {spoiled: interval(-0.001)})


def test_other_rules():
    chain = {name: interval(0.1) for name in ("base", "once", "one router", "outer", "dense minus dense chain")}
    assert chain_of_experts.holds(chain | {"dense minus dense chain": interval(0.05)})
    assert not chain_of_experts.holds(chain | {"dense minus dense chain": interval(0.2)})
    assert not chain_of_experts.holds(chain | {"one router": interval(-0.1)})
    reuse = {"own - three": interval(0.1), "base - three": interval(0.1), "three, all - three": interval(0.1)}
    assert rexmoe.holds(reuse | {"own - three, all": interval(0.0)})
    assert not rexmoe.holds(reuse | {"own - three, all": interval(0.2)})
    cut = {f"at {m}": interval(0.1) for m in sortednet.SIZES}
    assert sortednet.holds([3.0, 2.5, 2.5], cut, 1.03)
    assert not sortednet.holds([3.0, 2.5, 2.6], cut, 1.03)
    assert not sortednet.holds([3.0, 2.5, 2.5], cut, 1.05)
    assert not sortednet.holds([3.0, 2.5, 2.5], cut | {"at 8": interval(-0.1)}, 1.0)
    assert ernie5_elastic.holds({"mean": interval(0.1)}, 1.01)
    assert not ernie5_elastic.holds({"mean": interval(0.1)}, 1.03)
    assert smoe_dropout.holds([9.0, 3, 2, 1, 1, 1], [2, 1, 2, 3, 4, 5], 0.1)
    assert not smoe_dropout.holds([9.0, 3, 2, 1, 1, 1.1], [2, 1, 2, 3, 4, 5], 0.1)
    assert not smoe_dropout.holds([9.0, 3, 2, 1, 1, 1], [5, 4, 3, 2, 1, 0.5], 0.1)
    leads = {"switch": interval(0.1), "switch, longer": interval(0.1)}
    assert evomoe.holds(leads, [1.0, 12.0, 9.0, 4.0, 1.0, 1.0])
    assert not evomoe.holds(leads, [1.0, 9.0, 12.0, 4.0, 1.0, 1.0])
    assert not evomoe.holds(leads, [1.0, 12.0, 9.0, 4.0, 2.0, 1.5])


def test_barred_experts_are_the_best_of_each_token():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    selector = TopK(Site(hidden_size=4, intermediate_size=4, num_experts=4, top_k=2))
    assert deepseek_moe.Barred(selector, 1)(scores, Context()).tolist() == [[1, 2], [2, 1]]
    assert deepseek_moe.Barred(selector, 3)(scores, Context()).tolist() == [[3, PAD], [0, PAD]]


def test_probes_leave_the_model_as_it_was_but_for_the_shared_expert():
    model = tiny()
    before = _probing.bits(model, 1)
    assert set(deepseek_moe.losses(model, 1)) == {"1/16 barred", "2/16 barred", "4/16 barred"}
    assert set(sortednet.most_used(model, 1)) == set(sortednet.prefixes(model, 1))
    assert set(ernie5_elastic.degradation(model, 1)) == {*ernie5_elastic.SMALLER, "mean"}
    slots = smoe_dropout.slots(model, 1)
    assert slots["at 4"] == before == _probing.bits(model, 1)
    assert slots["at 1"] != before
    shared = tiny(shared_expert_intermediate_size=8)
    assert deepseek_moe.losses(shared, 1)[deepseek_moe.LOST] != 0


def test_the_most_used_experts_lose_no_more_than_the_least_used():
    model = tiny()
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data[4:] = 0
        layer.mlp.gate.scorer.weight.data[4:] = 0
        layer.mlp.gate.scorer.weight.data[:4] *= 100
    found = sortednet.most_used(model, 1)
    assert all(layer.mlp.gate.pool is None for layer in model.model.layers)
    assert found["at 14"] == pytest.approx(found["at 16"], abs=0.02)


def test_swapped_words_are_words_of_the_text():
    clean, swapped = _league.windows("prose", 3), momentum_smoe.corrupted("prose", 3)
    assert not torch.equal(clean[:2], swapped[:2])
    words = set(bytes(clean.flatten().tolist()).split())
    kept = [word in words for word in bytes(swapped.flatten().tolist()).split()]
    assert sum(kept) > 0.8 * len(kept)


def test_a_probe_is_kept_and_the_figures_with_it(monkeypatch):
    calls = []

    def trained(recipe, after_step=None):
        calls.append(recipe)
        return recipe.build().eval(), {"course": {}, _league.USED: 0}

    monkeypatch.setattr(_league, "trained", trained)
    recipe = momentum_smoe.arms()["base"]
    found = _probing.probed(recipe, 5, "name", lambda model, seed: {"figure": float(seed)})
    again = _probing.probed(recipe, 5, "name", lambda model, seed: {"figure": 0.0})
    assert found == again
    assert found["probe"] == {"figure": 5.0}
    assert _league.play(recipe, 5)["bits_per_byte"] == found["bits_per_byte"]
    assert len(calls) == 1
    assert _probing.probes([{"base": found, "other": {}}]) == [{"base figure": 5.0}]


def test_as_dear_a_run_of_one_expert():
    switch = evomoe.arms()[evomoe.SWITCH]
    assert evomoe.as_dear(switch, [1.0, 1.0]).options.steps == switch.options.steps
    dear = evomoe.as_dear(switch, [1.0, 16.0]).options.steps / switch.options.steps
    assert 2 < dear < 8.5
    recipe = sigma_moe_tiny.arms()
    ratio = recipe[sigma_moe_tiny.LONGER].options.steps / recipe[sigma_moe_tiny.ONE].options.steps
    assert 1.1 < ratio < 14 / 6


def test_the_first_layer_and_the_jump_at_the_switch():
    found = [{"one": {"load": [[0, 2, 4], [9, 9, 9]]}}]
    assert sigma_moe_tiny.first_layer(found, min) == [{"one": 0.0}]
    assert sigma_moe_tiny.first_layer(found, max) == [{"one": 2.0}]
    assert sigma_moe_tiny.jump([3.0] * 24 + [3.5] * 6) == 0.5


def test_slots_count_those_that_computed(monkeypatch):
    recipe = evomoe.arms()[evomoe.EVOLVED]
    model = tiny(experts="spawning")
    tokens = recipe.batch * (recipe.length + 1)
    running = SimpleNamespace(model=model, load=[torch.full((16,), tokens // 4)] * 6)

    def trained(recipe, after_step=None):
        for layer in model.model.layers:
            layer.mlp.experts.alone = True
        after_step(0, None, running)
        for layer in model.model.layers:
            layer.mlp.experts.alone = False
        after_step(1, None, running)
        return model, {"course": {}}

    monkeypatch.setattr(_probing, "trained", trained)
    assert _probing.slots(recipe, 1) == [1.0, 4.0]
    kept = next(_league.cache().glob("*.experts.json"))
    assert json.loads(kept.read_text()) == _probing.slots(recipe, 1)


def test_one_expert_per_token_counts_as_one_in_training():
    small = {"hidden_size": 16, "moe_intermediate_size": 4, "num_experts_per_tok": 1}
    assert _probing.slots(_league.contestant(**small).with_options(steps=1), 1) == [1.0]
