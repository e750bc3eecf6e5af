"""MoLE: exact where rows lie in one narrow space, else the discarded singular values; whitening, phases, training."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import families
from moekit.algebra import second_moments, weighted_error
from moekit.blocks import blocks
from moekit.compress import method
from moekit.compress._factors import matrices
from moekit.compress._sample import Sample
from moekit.compress.mole_latent import train_latent, trained_bank
from moekit.errors import OptionError, ProfileError
from moekit.formats import DenseBank, LatentBank
from moekit.train import Objective, TrainOptions, distil
from moekit.train.parametrise import settle

NAME = "model.layers.0.mlp"


def latent(model, spec: str, profile=None) -> LatentBank:
    stored = method(spec).plan(profile, model).layers[NAME].values.bank()
    assert isinstance(stored, LatentBank)
    return stored


def error(model, stored, part: str, experts=range(8)) -> float:
    """Squared, over experts."""
    bank = model.banks[NAME]
    pairs = ((matrices(bank.expert(e))[part], matrices(stored.expert(e))[part]) for e in experts)
    return float(sum((a - b).double().square().sum() for a, b in pairs))


def discarded(model, part: str, experts, size: int) -> float:
    stack = torch.cat(
        [matrices(model.banks[NAME].expert(e))[part].double() for e in experts], dim=1 if part == "down" else 0
    )
    return float(torch.linalg.svdvals(stack)[size:].square().sum())


def test_experts_on_a_common_basis_are_converted_exactly(model) -> None:
    """W_i = A_i B0 with a basis per group of four: nothing is lost, at 4 latent dimensions of 6."""
    g = torch.Generator().manual_seed(3)
    bases = torch.randn(2, 2, 4, 6, generator=g).repeat_interleave(4, dim=0)
    cores = torch.randn(8, 2, 4, 4, generator=g)
    model.banks[NAME] = DenseBank((cores @ bases).flatten(1, 2), model.banks[NAME].down)
    stored = latent(model, "mole-latent:group=4")
    for part in ("gate", "up", "down"):
        assert error(model, stored, part) < 1e-9
    assert error(model, latent(model, "mole-latent:group=8"), "gate") > 0.1
    assert error(model, latent(model, "mole-latent:group=4,rank=3"), "gate") > 0.1


@pytest.mark.parametrize(("size", "groups"), [(4, [range(4), range(4, 8)]), (3, [range(3), range(3, 6), range(6, 8)])])
def test_what_is_lost_is_the_discarded_singular_values(model, size: int, groups) -> None:
    stored = latent(model, f"mole-latent:group={size},rank=3,down=true")
    for part in ("gate", "up", "down"):
        for members in groups:
            lost = discarded(model, part, members, 3)
            assert error(model, stored, part, members) == pytest.approx(lost, rel=1e-4)


def test_alone_at_full_size_nothing_is_lost_or_saved(model) -> None:
    layer = method("mole-latent:group=1").plan(None, model).layers[NAME]
    stored = layer.values.bank()
    assert max(error(model, stored, part) for part in ("gate", "up", "down")) < 1e-9
    assert stored.nbytes > model.banks[NAME].nbytes
    assert layer.why.endswith("of 1: 144% of the numbers")


def test_all_of_a_layer_share_one_basis_with_group_zero(model) -> None:
    assert latent(model, "mole-latent:group=0").group == (0,) * 8
    assert latent(model, "mole-latent").group == (0, 0, 0, 0, 1, 1, 1, 1)


def test_phase_one_cuts_every_matrix_first(model) -> None:
    """Reduced to rank 1, four experts span four dimensions: the conversion adds nothing to what phase 1 lost."""
    stored = latent(model, "mole-latent:group=4,reduce=1")
    lost = sum(discarded(model, "gate", [e], 1) for e in range(8))
    assert error(model, stored, "gate") == pytest.approx(lost, rel=1e-4)
    assert error(model, stored, "down") == 0


def test_whitening_weighs_by_what_the_group_reads(model, profile) -> None:
    plain, white = (latent(model, f"mole-latent:rank=2,whiten={w}", profile) for w in ("false", "true"))
    sample = Sample.of(profile.layers[NAME])
    for part in ("gate", "up"):
        assert error(model, white, part) > error(model, plain, part)
        losses = []
        for stored in (plain, white):
            total = 0.0
            for members in (range(4), range(4, 8)):
                read = second_moments(torch.cat([sample.own(e).x_NH for e in members]).double())
                for e in members:
                    gap = matrices(model.banks[NAME].expert(e))[part] - matrices(stored.expert(e))[part]
                    total += float(weighted_error(gap.double(), read))
            losses.append(total)
        assert losses[1] < losses[0]


def test_a_profile_is_asked_for_only_to_whiten(model, profile) -> None:
    assert method("mole-latent").needs == frozenset()
    with pytest.raises(ProfileError, match="mole-latent needs a profile"):
        method("mole-latent:whiten=true").plan(None, model)
    whole = method("mole-latent:whiten=true,down=true").plan(profile, model)
    assert whole.profile == profile.fingerprint
    assert "all matrices, from 4 latent dimensions" in whole.layers[NAME].why


@pytest.mark.parametrize("bad", ["rank=-1", "group=-2", "reduce=-1"])
def test_wrong_options_are_refused(bad: str) -> None:
    with pytest.raises(OptionError, match=bad):
        method(f"mole-latent:{bad}")


def test_a_latent_space_wider_than_what_there_is_is_refused(model) -> None:
    with pytest.raises(OptionError, match="rank 7 is not possible for 4 stacked matrices"):
        method("mole-latent:rank=7").plan(None, model)
    model.banks[NAME].gate_up[0, 0, 0] = float("nan")
    with pytest.raises(OptionError, match="hold NaN or infinite values"):
        method("mole-latent").plan(None, model)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_latent_experts_train_and_are_read_off(family: str) -> None:
    """Gate and up stay on their group's basis whatever training does; interleaved and transposed stacks too."""
    model, inputs = families.build(family)
    teacher, group = deepcopy(model), [0, 0, 0, 0, 1, 1, 1, 1]
    block = blocks(model)[0]
    train_latent(block, group, 8)
    batch = {"input_ids": inputs["input_ids"]}
    options = TrainOptions(steps=3, learning_rate=1e-2)
    distil(model, teacher, lambda step: batch, options, Objective(lm=1.0), what=["experts"])
    made = trained_bank(block, torch.float32)
    settle(block)
    settled = block.bank()
    before = blocks(teacher)[0].bank()
    for e in range(8):
        for part, matrix in matrices(settled.expert(e)).items():
            assert torch.allclose(matrices(made.expert(e))[part], matrix, atol=1e-5)
            assert not torch.allclose(matrices(before.expert(e))[part], matrix, atol=1e-3)
    assert made.has_bias is (family == "gpt_oss")
    stack = torch.cat([matrices(settled.expert(e))["up"] for e in range(4)])
    assert int(torch.linalg.matrix_rank(stack, rtol=1e-4)) == 8
