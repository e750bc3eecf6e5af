"""The tree gate: exact leaf probabilities, exact sparsity, weights by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import leaks, lives, tiny, tokens

from moekit.contract import Context, route
from moekit.errors import OptionError
from moekit.nn.parts import Site
from moekit.nn.router import Router
from moekit.nn.tree import Tree, leaves, smooth_step


def site(experts, top_k=2):
    return Site(hidden_size=5, intermediate_size=4, num_experts=experts, top_k=top_k)


def gate(experts, width=1.0, spread=0.3, top_k=2, **options):
    torch.manual_seed(experts)
    router = Router(site(experts, top_k), {"score": {"kind": "tree", "width": width, **options}, "select": "support"})
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return router


def walked(go, leaf, count):
    """The probability of a leaf, from the leaf up to the root."""
    node, share = leaf + count - 1, 1.0
    while node:
        parent = (node - 1) // 2
        share *= go[parent] if node == 2 * parent + 1 else 1 - go[parent]
        node = parent
    return share


@given(st.integers(1, 13), st.integers(0, 99))
def test_leaves_are_products_along_their_paths_and_sum_to_1(count, seed):
    go = torch.rand(3, 2, count - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = leaves(go)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    for t, j in itertools.product(range(3), range(2)):
        wanted = [walked(go[t, j].tolist(), leaf, count) for leaf in range(count)]
        assert found[t, j].tolist() == pytest.approx(wanted)


@given(st.floats(-5, 5), st.floats(0.1, 4))
def test_the_smooth_step(t, width):
    found = float(smooth_step(torch.tensor(t, dtype=torch.float64), width))
    if abs(t) >= width / 2:
        assert found == pytest.approx(float(t > 0), abs=1e-12)
    else:
        assert found == pytest.approx(-2 * t**3 / width**3 + 1.5 * t / width + 0.5)
    assert found + float(smooth_step(torch.tensor(-t, dtype=torch.float64), width)) == pytest.approx(1)


def test_weights_by_hand():
    router, x = gate(5, permute="each"), torch.randn(4, 5)
    tree = router.scorer
    tree.permutation.logits.data.mul_(30)
    routing = route(router, x, router.entered(x, Context()))
    weight = torch.zeros(4, 5)
    matrix = tree.permutation.matrix()
    for t in range(4):
        terms = []
        for j in range(2):
            go = smooth_step(tree.nodes[j] @ x[t], 1.0).tolist()
            scores = tree.weight[j] @ x[t] + tree.bias[j]
            terms += [scores[leaf].exp() * walked(go, leaf, 5) for leaf in range(5)]
        share = (torch.stack(terms) / torch.stack(terms).sum()).view(2, 5)
        weight[t] = sum(share[j] @ matrix[j] for j in range(2))
    torch.testing.assert_close(routing.dense(5), weight / weight.sum(1, keepdim=True))


@given(st.integers(2, 9), st.integers(1, 3))
def test_at_saturation_no_more_choices_than_trees(experts, trees):
    router, x = gate(experts, width=1e-6, trees=trees), torch.randn(20, 5)
    routing = route(router, x, router.entered(x, Context()))
    used = routing.used.sum(1)
    assert int(used.max()) <= trees
    assert int(used.min()) >= 1
    torch.testing.assert_close(routing.weight.sum(1), torch.ones(20))


def test_a_wide_step_uses_every_choice():
    router, x = gate(6, width=1e3), torch.randn(3, 5)
    assert route(router, x, router.entered(x, Context())).used.all()


def test_minimising_the_entropy_of_leaves_makes_a_gate_sparse():
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    router = gate(6, width=4.0, spread=0.1)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.05)
    used = []
    for _ in range(120):
        optimiser.zero_grad()
        v = leaves(smooth_step(torch.einsum("th,jnh->tjn", x, router.scorer.nodes), 4.0))
        (-(v * v.clamp(min=1e-9).log()).sum((1, 2)).mean()).backward()
        optimiser.step()
        used.append(float(route(router, x, router.entered(x, Context())).used.sum(1).float().mean()))
    assert used[0] == 6
    assert used[-1] <= 3


def test_the_term_is_the_mean_entropy_of_all_trees():
    model = tiny(router={"score": {"kind": "tree", "width": 1e3}, "select": "support"}, balance={"leaf-entropy": 1.0})
    found = float(model.train()(tokens()).losses["leaf-entropy"].detach())
    assert found == pytest.approx(2 * 2 * torch.log(torch.tensor(4.0)).item(), rel=1e-2)


@pytest.mark.parametrize("permute", ["none", "shared", "each"])
def test_lives(tmp_path, permute):
    score = {"kind": "tree", "permute": permute, "tau": 1.0, "width": 8.0}
    model = lives(tmp_path, router={"score": score, "select": "support"}, balance={"leaf-entropy": 0.01})
    assert not leaks(model)


def test_one_expert_alone_and_numbers_that_are_none():
    assert route(gate(1, top_k=1), torch.randn(3, 5)).expert.tolist() == [[0]] * 3
    router = gate(4)
    assert route(router, torch.full((2, 5), torch.nan)).weight.isnan().any(1).all()
    assert route(router, torch.empty(0, 5)).expert.shape[0] == 0


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"trees": 0}, "one tree at least and a positive width, got 0 and 1"),
        ({"width": 0}, "one tree at least and a positive width, got 2 and 0"),
        ({"permute": "all"}, "permute='all' of a tree gate: choose none, shared or each"),
    ],
)
def test_bad_options(score, message):
    with pytest.raises(OptionError, match=message):
        Tree(site(4), **score)


def test_the_term_needs_a_tree():
    model = tiny(balance={"leaf-entropy": 1.0}).train()
    with pytest.raises(OptionError, match="needs the scorer 'tree'"):
        model(tokens())
