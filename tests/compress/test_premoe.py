"""PreMoe: TCESS ranks by winning logits, patterns give back each layer's own best, and retrieval finds the task."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit import lab
from moekit.algebra import best
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._patterns import ranking
from moekit.compress.premoe import Patterns, marker, partial_checkpoint
from moekit.errors import OptionError, OutputError, PlanError, ProfileError
from moekit.plan.planner import Site
from moekit.profile import profile as observe
from moekit.stream import LoadedModel

NAME = "model.layers.0.mlp"
TASKS = ("arithmetic", "sorting")


def kept(plan, layer: str = NAME) -> list[int]:
    return sorted(plan.layers[layer].sources)


def test_the_score_is_the_mean_winning_logit_and_may_be_negative(model, profile) -> None:
    layer = profile.layers[NAME]
    layer.strong_logit[:, 0] = [50, 40, 30, 0, 0, -5, -90, 0]
    layer.strong_logit[:, 1] = [0, 0, 0, 100, 0, 0, 0, 0]
    plan = method("premoe:keep=5").plan(profile, model)
    assert kept(plan) == [0, 1, 2, 3, 4]  # 4 never wins; 6 wins most often, with logits below zero
    assert "negative for 2, which so rank below experts that never win" in plan.layers[NAME].why
    assert kept(method("premoe:keep=2,domains=code").plan(profile, model)) == [0, 1]
    assert kept(method("premoe:keep=2,domains=prose").plan(profile, model)) == [0, 3]


@given(st.lists(st.integers(-3, 3), min_size=12, max_size=12), st.sampled_from([1, 2, 3]))
def test_every_prefix_of_a_ranking_is_the_best_of_its_size(scores: list[int], groups: int) -> None:
    score_E = np.array(scores, dtype=float)
    order = ranking(score_E, groups)
    for count in range(groups, 13, groups):
        assert tuple(sorted(order[:count].tolist())) == best(score_E, count, num_groups=groups)


@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_stored_permutations_give_each_layer_its_own_best(model, profile, groups) -> None:
    model.sites = [Site(site.name, 8, 2, groups) for site in model.sites]
    patterns = Patterns.of(profile, model)
    for task in ("code", "prose"):
        for keep in (8,) if groups else (2, 3, 5, 8):
            planned, ours = (
                method(f"premoe:keep={keep},domains={task}").plan(profile, model),
                patterns.plan(task, keep, model),
            )
            assert {n: layer.sources for n, layer in ours.layers.items()} == {
                n: layer.sources for n, layer in planned.layers.items()
            }
            assert f"stored pattern of the task {task}" in ours.layers[NAME].why


def test_patterns_survive_saving_and_refuse_what_is_not_theirs(model, profile, tmp_path) -> None:
    patterns, path = Patterns.of(profile, model), tmp_path / "tasks.safetensors"
    patterns.save(path)
    again = Patterns.load(path)
    assert again.tasks == ("code", "prose")
    assert again.plan("code", 3, model) == patterns.plan("code", 3, model)
    assert all(np.array_equal(again.keys[task], patterns.keys[task]) for task in again.tasks)
    with pytest.raises(OutputError, match="exists; give another path"):
        patterns.save(path)
    with pytest.raises(OutputError, match="cannot write the patterns"):
        patterns.save(tmp_path / "no" / "folder")
    with pytest.raises(ProfileError, match="cannot be read"):
        Patterns.load(tmp_path / "nothing")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ProfileError, match="cannot be read"):
        Patterns.load(tmp_path / "junk")
    with pytest.raises(OptionError, match="no pattern for the task 'math': there are code, prose"):
        patterns.plan("math", 3, model)
    with pytest.raises(PlanError, match="fewer than the top-k of 2"):
        patterns.plan("code", 1, model)
    with pytest.raises(PlanError, match="the patterns are of another model"):
        replace(patterns, source="0" * 64).plan("code", 3, model)
    with pytest.raises(OptionError, match="no pattern to choose from"):
        replace(patterns, keys={}).retrieve(np.zeros(8))


def test_a_file_of_something_else_is_no_store(model, profile, tmp_path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ProfileError, match="holds no patterns of version 1"):
        Patterns.load(tmp_path / "other.safetensors")


def test_layers_of_different_sizes_have_no_pattern(model, profile) -> None:
    model.sites[1] = replace(model.sites[1], num_experts=6)
    with pytest.raises(PlanError, match=r"as many experts and groups in every layer, but .* has 8 experts and .* 6"):
        Patterns.of(profile, model)


def test_the_nearest_key_wins(model, profile) -> None:
    patterns = Patterns.of(profile, model)
    near = 0.9 * patterns.keys["prose"] + 0.1 * patterns.keys["code"]
    found = patterns.retrieve(near)
    assert found.task == "prose"
    assert found.margin > 0
    assert patterns.retrieve(patterns.keys["code"]).distance == 0.0
    alone = replace(patterns, keys={"code": patterns.keys["code"]})
    assert alone.retrieve(near).margin == float("inf")


@pytest.fixture(scope="module")
def mini():
    source = Checkpoint.open("moekit:mini")
    runner = LoadedModel.load(source, dtype=torch.float32)
    texts = {task: [lab.text(task, "calibration", 2000, 1)] for task in TASKS}
    seen = observe(runner, texts, held_out=0.0, trace=0, statistics=("counts", "strong_logit"), sequence_length=128)
    return source, runner, Patterns.of(seen, source)


def test_a_query_finds_its_task_from_the_first_layer_alone(mini) -> None:
    source, runner, patterns = mini
    tokenizer, ran = source.tokenizer(), []
    later = runner.model.get_submodule(source.moe_layers[1].name)
    hook = later.register_forward_pre_hook(lambda *_: ran.append(1))
    right = 0
    for task in TASKS:
        for prompt, _ in lab.examples(task, "test", 10, 0):
            ids = np.array(tokenizer(prompt)["input_ids"])
            right += patterns.retrieve(marker(runner, [ids])).task == task
    hook.remove()
    assert right >= 19
    assert not ran
    with pytest.raises(PlanError, match="a query needs two tokens"):
        marker(runner, [np.array([1])])


def test_a_marker_of_the_stored_text_is_the_stored_key(mini) -> None:
    source, runner, _ = mini
    ids = np.array(source.tokenizer()(lab.text("sorting", "calibration", 512, 3))["input_ids"])
    seen = observe(runner, {"own": [ids]}, held_out=0.0, trace=0, statistics=("counts", "strong_logit"))
    expected = Patterns.of(seen, source).keys["own"]
    assert np.allclose(marker(runner, [ids]), expected, atol=1e-5)


def test_only_the_kept_experts_are_read_and_the_model_runs_as_if_the_others_were_masked(mini) -> None:
    source, runner, patterns = mini
    plan = patterns.plan("sorting", 4, source)
    fresh = Checkpoint.open("moekit:mini")
    loaded = LoadedModel.load(partial_checkpoint(fresh, plan), dtype=torch.float32)
    assert fresh.counted_bytes < 0.45 * sum(info.nbytes for info in fresh.tensors.values())
    batch = {"input_ids": torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(0))}
    ours = next(iter(loaded.forward([batch])))
    with ExitStack() as stack:
        for block in blocks(runner.model):
            stack.enter_context(block.mask(sorted(plan.layers[block.name].sources)))
        theirs = next(iter(runner.forward([batch])))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, next(iter(runner.forward([batch]))), atol=1e-2)
