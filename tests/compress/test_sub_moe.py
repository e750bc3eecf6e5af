"""Sub-MoE: untruncated it is the usage-weighted mean, cut the shared whitened SVD; clusters never span layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moekit.algebra import second_moments, shared_columns
from moekit.compress import method
from moekit.compress._factors import matrices
from moekit.compress._sample import Sample, hidden_units
from moekit.compress.sub_moe import DAMPING
from moekit.errors import OptionError, PlanError
from moekit.formats import DenseBank, LowRankBank
from moekit.plan import make_plan, values
from moekit.plan.recombine import recombined

NAME = "model.layers.0.mlp"
OTHER = "model.layers.1.mlp"


def clusters(layer) -> list[list[int]]:
    return [[e for e, slot in enumerate(layer.slots) if slot == m] for m in range(len(layer.experts))]


def part(bank: DenseBank, name: str) -> torch.Tensor:
    return torch.stack([matrices(bank.expert(e))[name] for e in range(bank.num_experts)]).double()


@pytest.mark.parametrize("keep", ["4", "2"])
def test_untruncated_is_the_usage_weighted_mean_and_so_is_the_joint_svd(model, profile, keep: str) -> None:
    """U S V_m^T of the full SVD of [W_1 | .. | W_n] equals sum f_i W_i / sum f_i: nothing is resolved by it."""
    for name, layer in method(f"sub-moe:keep={keep},pool=1").plan(profile, model).layers.items():
        bank, made = model.banks[name], recombined(model.banks[name], layer)
        usage = torch.from_numpy(profile.layers[name].total("counts"))
        assert layer.values is None
        assert len(layer.experts) == int(keep)
        for slot, members in enumerate(clusters(layer)):
            share = usage[members] / usage[members].sum()
            for name_of_part in ("gate", "up", "down"):
                weights = part(bank, name_of_part)[members]
                mean = torch.einsum("n,nrc->rc", share, weights)
                assert torch.allclose(shared_columns(weights).mean(share), mean, atol=1e-12)
                assert torch.allclose(part(made, name_of_part)[slot], mean, atol=1e-6)


def test_cut_is_the_shared_whitened_svd_with_the_mean_of_the_blocks(model, profile) -> None:
    rank = 1
    layer = method(f"sub-moe:keep=3,pool=1,rank={rank}").plan(profile, model).layers[NAME]
    bank, sample = model.banks[NAME], Sample.of(profile.layers[NAME])
    usage = torch.from_numpy(profile.layers[NAME].total("counts"))
    stored = layer.values.bank()
    assert isinstance(stored, LowRankBank)
    for slot, members in enumerate(clusters(layer)):
        for name in ("gate", "up", "down"):
            weights, moments = part(bank, name)[members], []
            for e in members:
                x = sample.own(e).x_NH
                x = hidden_units(bank.expert(e), bank.activation, x) if name == "down" else x
                moments.append(second_moments(x.double()))
            energy = sum(float((w @ m @ w.T).trace()) for w, m in zip(weights, moments, strict=True))
            damped = torch.stack(moments) + DAMPING * energy / weights.square().sum() * torch.eye(weights.shape[2])
            expected = shared_columns(weights, rank, damped).mean(usage[members])
            assert torch.allclose(matrices(stored.expert(slot))[name].double(), expected, atol=1e-5)


def test_copies_fall_together_whatever_the_router_thinks(model, profile) -> None:
    first = model.banks[NAME].select([0, 1, 2, 3])
    order = [0, 1, 2, 3, 2, 0, 3, 1]
    model.banks[NAME] = first.select(order)
    layer = method("sub-moe:keep=4,pool=1").plan(profile, model).layers[NAME]
    assert clusters(layer) == [[0, 5], [1, 7], [2, 4], [3, 6]]
    made = recombined(model.banks[NAME], layer)
    assert torch.allclose(made.gate_up, first.gate_up, atol=1e-6)
    assert torch.allclose(made.down, first.down, atol=1e-6)


def test_a_pool_gives_clusters_to_the_layer_that_needs_them(model, profile) -> None:
    """One layer of two kinds of experts, one of eight: together 10 clusters, and none holds experts of both."""
    model.banks[NAME] = model.banks[NAME].select([0, 1, 0, 1, 0, 1, 0, 1])
    plan = method("sub-moe:keep=5,pool=2").plan(profile, model)
    assert [len(plan.layers[name].experts) for name in (NAME, OTHER)] == [2, 8]
    assert clusters(plan.layers[NAME]) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    alone = method("sub-moe:keep=5,pool=1").plan(profile, model)
    assert [len(alone.layers[name].experts) for name in (NAME, OTHER)] == [2, 5]  # no more where more saves nothing


def test_a_layer_of_identical_experts_becomes_one(model, profile) -> None:
    model.banks[NAME] = model.banks[NAME].select([0] * 8)
    layer = method("sub-moe:keep=4,pool=1").plan(profile, model).layers[NAME]
    assert layer.slots == (0,) * 8
    assert torch.allclose(recombined(model.banks[NAME], layer).down[0], model.banks[NAME].down[0], atol=1e-6)


def test_a_cluster_without_tokens_is_cut_unwhitened_and_named(model, profile) -> None:
    seen = profile.layers[NAME]
    chosen = seen.sample_expert % 7  # nobody chooses expert 7
    lonely = replace(seen, arrays={**seen.arrays, "sample_expert": chosen})
    seen_again = replace(profile, layers={**profile.layers, NAME: lonely})
    layer = method("sub-moe:keep=8,rank=1").plan(seen_again, model).layers[NAME]
    assert layer.why.endswith("unwhitened because no sampled token chose them: stored experts 7")
    gate = part(model.banks[NAME], "gate")[7:]
    got = matrices(layer.values.bank().expert(7))["gate"].double()
    assert torch.allclose(got, shared_columns(gate, 1).weight()[0], atol=1e-5)


def test_ranks_that_save_nothing_leave_the_matrices_whole(model, profile) -> None:
    layer = method("sub-moe:keep=4,rank=3").plan(profile, model).layers[NAME]
    assert layer.values is None
    assert layer.why.endswith("rank 3 makes no matrix smaller")


def test_outputs_of_many_experts_are_compared_on_as_many_tokens_as_fit(model, profile, monkeypatch) -> None:
    """The bound counts: with room for three tokens' products, tokens four and later cannot matter."""
    from moekit.compress import sub_moe

    monkeypatch.setattr(sub_moe, "WORK_BYTES", 8 * 8**2 * 3)
    few = method("sub-moe:keep=3").plan(profile, model)
    for layer in profile.layers.values():
        layer.hidden[3:] = np.random.default_rng(9).normal(size=layer.hidden[3:].shape)
    assert {n: layer.slots for n, layer in method("sub-moe:keep=3").plan(profile, model).layers.items()} == {
        n: layer.slots for n, layer in few.layers.items()
    }


def test_an_interrupted_cut_is_taken_up_without_clustering_again(model, profile, tmp_path, monkeypatch) -> None:
    with values.spooling(tmp_path):
        first = method("sub-moe:keep=4,rank=1").plan(profile, model)
        monkeypatch.setattr("moekit.compress.sub_moe.kmeans", None)
        assert method("sub-moe:keep=4,rank=1").plan(profile, model) == first


def test_rounding_may_follow_the_merge_but_not_the_cut(model, profile) -> None:
    both = make_plan([method("sub-moe:keep=4"), method("rtn:bits=4,group_size=2")], model, profile)
    assert {e.bits for layer in both.layers.values() for e in layer.experts} == {4}
    with pytest.raises(PlanError, match="stored as low-rank cannot be rounded"):
        make_plan([method("sub-moe:keep=4,rank=1"), method("rtn:bits=4,group_size=2")], model, profile)


@pytest.mark.parametrize("bad", ["rank=-1", "pool=0", "tokens=0", "keep=0"])
def test_wrong_options_are_refused(bad: str) -> None:
    with pytest.raises(OptionError, match=bad):
        method(f"sub-moe:{bad}")


def test_outputs_that_are_no_numbers_are_refused(model, profile) -> None:
    model.banks[NAME].down[3, 0, 0] = float("nan")
    with pytest.raises(OptionError, match="hold NaN or infinite values"):
        method("sub-moe:keep=4").plan(profile, model)
