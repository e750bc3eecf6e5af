"""MC-SMoE: the merge is m-smoe's, the rest its truncated SVD with whole rows; recovery trains groups as one."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch

import families
from moekit.blocks import blocks
from moekit.compress import method
from moekit.compress._factors import matrices
from moekit.compress.mc_smoe import train_merged, trained_bank
from moekit.errors import OptionError
from moekit.formats import DenseBank, LowRankBank
from moekit.plan import LayerPlan, StoredExpert
from moekit.plan.recombine import recombined
from moekit.train import Objective, TrainOptions, distil
from moekit.train.parametrise import settle
from moekit.train.schedule import RowPruning

NAME = "model.layers.0.mlp"


def plans(model, profile, spec: str) -> tuple[LayerPlan, LayerPlan]:
    keep = spec.partition(",")[0].partition(":")[2]
    return tuple(method(one).plan(profile, model).layers[NAME] for one in (spec, f"m-smoe:{keep}"))


def test_the_groups_are_those_of_m_smoe_and_rank_and_rows_come_on_top(model, profile) -> None:
    ours, theirs = plans(model, profile, "mc-smoe:keep=4,rank=1,rows=0.25")
    assert (ours.slots, ours.rows, ours.experts) == (theirs.slots, theirs.rows, theirs.experts)
    merged, stored = recombined(model.banks[NAME], theirs), ours.values.bank()
    assert isinstance(stored, LowRankBank)
    for index in range(len(ours.experts)):
        for part, matrix in matrices(merged.expert(index)).items():
            left, values, right = torch.linalg.svd(matrix)
            rest = matrix - values[0] * torch.outer(left[:, 0], right[0])
            count = round(0.25 * len(matrix))
            rest[rest.norm(dim=1).topk(len(matrix) - count, largest=False).indices] = 0
            expected = values[0] * torch.outer(left[:, 0], right[0]) + rest
            assert torch.allclose(matrices(stored.expert(index))[part], expected, atol=1e-5)
            assert stored.rows[part][index] == count


def test_without_rows_the_error_is_the_discarded_singular_values(model, profile) -> None:
    ours, theirs = plans(model, profile, "mc-smoe:keep=8,rank=2,rows=0.0")
    merged, stored = recombined(model.banks[NAME], theirs), ours.values.bank()
    for index in range(len(ours.experts)):
        for part, matrix in matrices(merged.expert(index)).items():
            error = (matrices(stored.expert(index))[part] - matrix).square().sum()
            assert torch.isclose(error, torch.linalg.svdvals(matrix)[2:].square().sum(), rtol=1e-4)


def test_what_factors_would_not_shrink_stays_whole(model, profile) -> None:
    """At 6 x 4, rank 2 holds 20 numbers of 24; a quarter of the rows of gate and up (one, of 6) makes that 26."""
    layer = method("mc-smoe:keep=4,rank=2,rows=0.25").plan(profile, model).layers[NAME]
    assert layer.values is None
    assert layer.why.endswith("rank 2 makes no matrix smaller")
    layer = method("mc-smoe:keep=4,rank=2,rows=0.12").plan(profile, model).layers[NAME]  # none of 4 rows, 1 of 6
    assert {part: set(rank) for part, rank in layer.values.bank().rank.items()} == {
        "gate": {2},
        "up": {2},
        "down": {None},
    }


@pytest.mark.parametrize("bad", ["rank=0", "rows=1.5", "rows=nan", "keep=0"])
def test_wrong_options_are_refused(bad: str) -> None:
    with pytest.raises(OptionError, match=bad):
        method(f"mc-smoe:{bad}")


@pytest.fixture
def merged_block():
    """A live block whose eight experts have become three, and its model."""
    model, inputs = families.build("qwen3_moe")
    block = blocks(model)[0]
    slots = [0, 1, 2, 0, 1, 2, 2, 2]
    plan = LayerPlan.aliased([StoredExpert(((e, 1.0),)) for e in range(3)], slots)
    bank = block.bank()
    block.put(DenseBank(bank.gate_up[slots].clone(), bank.down[slots].clone(), activation=bank.activation))
    return model, block, plan, inputs["input_ids"]


def test_training_starts_from_the_merged_weights_and_keeps_groups_one(merged_block) -> None:
    model, block, plan, ids = merged_block
    teacher, before = deepcopy(model), block.bank().down.detach().clone()
    for each in blocks(model):
        train_merged(each, plan if each.name == block.name else LayerPlan.identity(8), rank=2)
    assert torch.allclose(block.experts.down_proj, before, atol=1e-6)
    options = TrainOptions(steps=4, learning_rate=1e-2)
    pruning = RowPruning([block], 4, final=0.25, warm=0.1, cool=0.4)
    batch = partial(dict, input_ids=ids)
    distil(model, teacher, lambda step: batch(), options, Objective(lm=1.0), what=["experts"], after_step=pruning)
    down = block.experts.down_proj.detach()
    assert not torch.allclose(down, before, atol=1e-4)
    for one, other in enumerate(plan.slots):
        assert torch.equal(down[one], down[other])
    made = trained_bank(block, torch.float32)
    assert made.num_experts == 3
    assert torch.allclose(torch.stack([made.expert(e).down for e in range(3)]), down[:3], atol=1e-6)
    assert sum(map(sum, made.rows.values())) == round(0.25 * 3 * (16 + 16 + 32))
    settle(block)
    assert torch.equal(block.experts.down_proj, down)


def test_a_rank_above_full_rank_is_refused_in_training(merged_block) -> None:
    _, block, plan, _ = merged_block
    with pytest.raises(OptionError, match="rank=99 is not possible"):
        train_merged(block, plan, 99)
