"""Structured forms: exact at the start where they can be, trained in their own parameters, read out as banks."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import rows, sparse

import families
from moekit.blocks import blocks
from moekit.errors import OptionError, UnsupportedModelError
from moekit.train import TrainOptions, batches_of, distil
from moekit.train.activations import int8, int8_activations
from moekit.train.forms import Frozen, LowRankSparse, Scaled, Ternary, Tied, ternary
from moekit.train.parametrise import held, low_rank_bank, parametrise, settle
from moekit.train.schedule import RowPruning, cubic


def trained(form, steps=4, **more):
    model = sparse(0)
    for block in blocks(model):
        parametrise(block, form)
    distil(
        model, sparse(1), batches_of(rows(), 4), TrainOptions(steps=steps, learning_rate=1e-2, weight_decay=0.1),
        what=("experts",), **{name: make(model) for name, make in more.items()},
    )  # fmt: skip
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.stack(rows(2)), use_cache=False).logits


@pytest.mark.parametrize(
    ("form", "bound"),
    [(lambda: LowRankSparse(3), 1e-4), (Scaled, 0), (lambda: Frozen([1]), 0), (lambda: Tied([0, 1, 2, 3]), 0)],
)
def test_a_form_begins_as_the_weights_and_settles_to_what_it_became(form, bound):
    model = sparse(0)
    before = logits(model)
    for block in blocks(model):
        parametrise(block, form)
    assert (logits(model) - before).abs().max() <= bound
    model = trained(form)
    after = logits(model)
    assert not torch.equal(after, before)
    for block in blocks(model):
        settle(block)
    assert torch.equal(logits(model), after)
    assert list(model.state_dict()) == list(sparse(0).state_dict())
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt_oss", "dots1", "granitemoe"])
def test_every_layout_of_stacked_experts(family):
    """Transposed, interleaved and biased stacks are split into the matrices that the bank has, and joined again."""
    model, inputs = families.build(family)
    with torch.no_grad():
        before = model(**inputs).logits
        for block in blocks(model):
            bank = block.bank()
            parametrise(block, lambda: LowRankSparse(2))
            for part, _, (left, right, rest) in held(block):
                rows = {"gate": bank.gate_up.chunk(2, 1)[0], "up": bank.gate_up.chunk(2, 1)[1], "down": bank.down}
                assert torch.allclose(left @ right + rest, rows[part], atol=1e-5)
        assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
        for block in blocks(model):
            settle(block)
    assert model.state_dict().keys() == families.build(family)[0].state_dict().keys()


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_ternary_has_one_level_per_expert(seed):
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed))
    weight[1] *= 100  # a scale over the whole stack would silence the others
    made = ternary(weight)
    for expert, own in zip(made, weight, strict=True):
        level = (own.abs().mean() + 1e-5).bfloat16().float()
        assert set(expert.unique().tolist()) <= {-level.item(), 0.0, level.item()}
        assert torch.equal(expert, (own / level).round().clamp(-1, 1) * level)


def test_the_gradient_passes_the_rounding_unchanged():
    form, weight = Ternary(), torch.randn(2, 3, 4, requires_grad=True)
    (form(weight) * torch.arange(4.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(4.0).expand(2, 3, 4))


def test_trained_ternary_experts_are_ternary():
    model = trained(Ternary)
    for block in blocks(model):
        settle(block)
        bank = block.bank()
        gate, up = bank.gate_up.chunk(2, dim=1)
        for part in (gate, up, bank.down):
            assert all(len(expert.abs().unique()) <= 2 for expert in part)


def test_frozen_experts_do_not_move_by_a_bit():
    before = {block.name: block.bank().gate_up.detach().clone() for block in blocks(sparse(0))}
    for block in blocks(trained(lambda: Frozen([0, 3]))):
        now = block.bank().gate_up.detach()
        assert torch.equal(now[[0, 3]], before[block.name][[0, 3]])
        assert not torch.equal(now[1], before[block.name][1])


def test_tied_rows_stay_one_expert():
    for block in blocks(trained(lambda: Tied([0, 1, 1, 0]))):
        bank = block.bank()
        assert torch.equal(bank.down[0], bank.down[3])
        assert torch.equal(bank.gate_up[1], bank.gate_up[2])
        assert not torch.equal(bank.down[0], bank.down[1])


def test_rows_are_pruned_to_the_schedule_and_stored_as_trained():
    steps = 8
    model = trained(lambda: LowRankSparse(2), steps, after_step=lambda m: RowPruning(blocks(m), steps, final=0.25))
    kept = [form.keep for block in blocks(model) for _, form, _ in held(block)]
    total = sum(keep.numel() for keep in kept)
    assert sum(int(keep.sum()) for keep in kept) == round(0.25 * total)
    block = blocks(model)[0]
    bank = low_rank_bank(block, torch.float32)
    for expert in range(4):
        assert torch.allclose(bank.expert(expert).down, block.bank().expert(expert).down, atol=1e-5)
        assert torch.allclose(bank.expert(expert).gate_up, block.bank().expert(expert).gate_up, atol=1e-5)
    for _, form, (_, _, rest) in held(block):
        assert not rest[~form.keep].any()


def test_the_cubic_schedule():
    shares = [cubic(step, 100, 0.1, 10, 40) for step in range(101)]
    assert shares[10] == 1
    assert shares[60] == shares[100] == 0.1
    assert shares[35] == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares))


def test_int8_is_what_it_says_and_lets_gradients_pass():
    x = torch.tensor([[1.0, -0.5, 0.001], [0.0, 0.0, 0.0]], requires_grad=True)
    made = int8(x)
    assert torch.allclose(made[0], torch.tensor([1.0, -64 / 127, 0.0]), atol=1e-6)
    made.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_int8_activations_are_close_and_put_back():
    model = sparse()
    before, name = logits(model), model.config._experts_implementation
    with int8_activations(model):
        inside = logits(model)
    assert 0 < (inside - before).abs().max() < 0.05 * before.abs().max()
    assert torch.equal(logits(model), before)
    assert model.config._experts_implementation == name


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda: LowRankSparse(99), r"rank=99 is not possible: matrices \[8, 16\] have 1 to 8"),
        (lambda: Tied([0, 1]), "2 slots for 4 experts"),
        (lambda: Tied([0, 2, 2, 0]), "must use every number from 0 to 2"),
        (lambda: Frozen([9]), "no expert 9; the layer has experts 0 to 3"),
        (lambda: Frozen([0, 1, 2, 3]), "nothing left to train"),
    ],
)
def test_forms_that_are_not_possible(form, message):
    with pytest.raises(OptionError, match=message):
        parametrise(blocks(sparse())[0], form)


def test_what_is_not_low_rank_has_no_factors():
    model = sparse()
    found = blocks(model)
    with pytest.raises(UnsupportedModelError, match="are not trained as low rank plus rows"):
        low_rank_bank(found[0], torch.float32)
    with pytest.raises(OptionError, match="only where experts are trained as low rank"):
        RowPruning(found, 4)
    copied = copy.deepcopy(model)
    parametrise(blocks(copied)[0], lambda: LowRankSparse(2))
    with pytest.raises(OptionError, match="must leave steps between them"):
        RowPruning(blocks(copied)[:1], 4, warm=0.5, cool=0.5)
