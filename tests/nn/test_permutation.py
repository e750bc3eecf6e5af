"""Learnt permutations: Sinkhorn's matrix, the assignment it tends to, and routers that wear one."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import leaks, lives, tiny, tokens

from moekit.contract import Context
from moekit.errors import OptionError
from moekit.nn.parts import Site
from moekit.nn.permutation import Permutation, Permuted, logarithm, sinkhorn
from moekit.nn.schedule import Moment, Schedule

SITE = Site(hidden_size=5, intermediate_size=4, num_experts=4)
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))


def drawn(size, count=1, seed=0, **options):
    part = Permutation(size, count, **options)
    torch.nn.init.normal_(part.logits, generator=torch.Generator().manual_seed(seed))
    return part


@given(st.integers(1, 6), st.integers(0, 99))
def test_sinkhorn_is_doubly_stochastic(size, seed):
    logits = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = sinkhorn(logits, 200).exp()
    torch.testing.assert_close(matrix.sum(1), torch.ones_like(matrix[:, 0]))
    torch.testing.assert_close(matrix.sum(2), torch.ones_like(matrix[:, 0]), atol=1e-6, rtol=0)


@given(st.integers(1, 5), st.integers(0, 99))
def test_settling_finds_the_best_of_all_permutations(size, seed):
    part = drawn(size, 2, seed)
    part.searching = False
    for order, values in zip(part.order.tolist(), part.logits.tolist(), strict=True):
        totals = {p: sum(values[a][b] for a, b in enumerate(p)) for p in permutations(range(size))}
        assert totals[tuple(order)] == pytest.approx(max(totals.values()))


@pytest.mark.parametrize("seed", range(4))
def test_a_cold_soft_matrix_points_where_it_settles(seed):
    part = drawn(4, seed=seed, tau=1e-2, iterations=1000)
    soft = part.matrix().detach()
    part.searching = False
    assert torch.equal(soft.argmax(-1), part.order)
    assert float(soft.max(-1).values.min()) > 0.9


def test_settled_is_for_good_and_begins_anew_with_the_weights():
    part = drawn(3)
    part.searching = False
    before = part.order.clone()
    part.logits.data.neg_()
    part.searching = True
    part.searching = False
    assert torch.equal(part.order, before)
    part.initialise(0.02)
    assert part.searching


def test_noise_is_for_training_alone():
    part = drawn(3, noise=1.0, tau=1.0)
    assert not torch.equal(part.train().matrix(), part.matrix())
    assert torch.equal(part.eval().matrix(), part.matrix())


def permuted(order):
    """A permuted scorer that is nearly certain of an order, and the plain one inside."""
    part = Permuted(SITE, tau=1.0, iterations=50)
    torch.nn.init.normal_(part.scorer.weight)
    part.permutation.logits.data.copy_(40.0 * torch.nn.functional.one_hot(torch.tensor(order), 4)[None])
    return part


def test_both_forms_put_the_choices_in_other_places():
    order = [2, 0, 3, 1]
    part = permuted(order)
    plain = part.scorer(X, Context())
    soft = part(X, Context()).softmax(-1)
    part.permutation.searching = False
    hard = part(X, Context())
    torch.testing.assert_close(soft, hard.softmax(-1), atol=1e-6, rtol=1e-4)
    for choice, place in enumerate(order):
        torch.testing.assert_close(hard[:, place], plain[:, choice])


def test_the_search_learns_where_a_choice_belongs():
    part, wanted = permuted([0, 1, 2, 3]), [1, 2, 3, 0]
    torch.nn.init.normal_(part.permutation.logits, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = part.scorer(X, Context()).argmax(-1)
    target = torch.tensor(wanted)[target]
    optimiser = torch.optim.Adam([part.permutation.logits], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(part(X, Context()), target).backward()
        optimiser.step()
    part.permutation.searching = False
    assert torch.equal(part(X, Context()).argmax(-1), target)


def test_logarithms_of_nothing_have_no_gradient():
    share = torch.tensor([0.5, 0.0, 1e-6], requires_grad=True)
    log = logarithm(share, 1e-5)
    assert log.tolist() == [pytest.approx(-0.6931, abs=1e-4), -torch.inf, -torch.inf]
    log.softmax(-1)[0].backward()
    assert share.grad is not None
    assert bool(share.grad.isfinite().all())


def test_a_schedule_cools_and_settles():
    model = tiny(router={"score": "permuted"})
    part = model.model.layers[0].mlp.gate.scorer.permutation
    name = "*.scorer.permutation"
    cool = Schedule(model, f"{name}.tau", {"kind": "exponential", "start": 1e-3, "end": 1e-7, "until": 0.5})
    settle = Schedule(model, f"{name}.searching", {"kind": "steps", "values": [True, False], "at": [0.5]})
    for step in range(11):
        cool.apply(Moment(step, 20))
        settle.apply(Moment(step, 20))
        assert part.searching == (step < 10)
    assert part.tau == pytest.approx(1e-7)
    assert model(tokens()).logits.isfinite().all()


def test_entropy_of_the_matrix_counts_rows_and_columns():
    model = tiny(router={"score": {"kind": "permuted", "tau": 1.0}}, balance={"permutation-entropy": 1.0}).train()
    for layer in model.model.layers:
        layer.mlp.gate.scorer.permutation.logits.data.zero_()
    found = float(model(tokens()).losses["permutation-entropy"].detach())
    assert found == pytest.approx(2 * 2 * 4 * torch.log(torch.tensor(4.0)).item(), rel=1e-5)
    for layer in model.model.layers:
        layer.mlp.gate.scorer.permutation.searching = False
    assert float(model(tokens()).losses["permutation-entropy"]) == 0


@pytest.mark.parametrize("settled", [False, True])
def test_lives(tmp_path, settled):
    model = lives(tmp_path, router={"score": {"kind": "permuted", "of": "mlp", "tau": 1.0}})
    assert not leaks(model)
    if settled:
        for layer in model.model.layers:
            layer.mlp.gate.scorer.permutation.searching = False
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert not again.model.layers[0].mlp.gate.scorer.permutation.searching
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": {"score": {"kind": "permuted", "tau": 0}}}, "needs tau > 0, iterations >= 1 and noise >= 0"),
        ({"router": {"score": {"kind": "permuted", "iterations": 0}}}, "needs tau > 0"),
        ({"router": {"score": {"kind": "permuted", "of": "none"}}}, "scorer 'none' is not known"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        tiny(**options)


def test_the_entropy_needs_a_permutation():
    model = tiny(balance={"permutation-entropy": 1.0}).train()
    with pytest.raises(OptionError, match="needs a scorer that permutes"):
        model(tokens())
