"""Router rows through experts: the table, the margins and the loss that couples them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import lives, tiny, tokens

import families
from moekit.blocks import blocks
from moekit.contract import Context, Routing
from moekit.errors import OptionError, UnsupportedModelError
from moekit.nn import Seen, Site
from moekit.nn.coupling import Coupling, coupled, excess, margins, measured, responses

SITE = Site(hidden_size=6, intermediate_size=5, num_experts=4, top_k=2)


class Holder(torch.nn.Module):
    """Something with attributes, as a router or a bank."""

    def __init__(self, **named):
        super().__init__()
        for name, value in named.items():
            setattr(self, name, value)


def layer(rows, gate_up):
    router = Holder(scorer=Holder(weight=torch.nn.Parameter(rows)))
    experts = Holder(gate_up_proj=torch.nn.Parameter(gate_up))
    empty = Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    return Seen(torch.zeros(0, 6), empty, router, experts, Context())


def test_table_is_what_each_gate_projection_answers():
    torch.manual_seed(0)
    rows, gate = torch.randn(4, 6), torch.randn(4, 5, 6)
    table = responses(rows, gate)
    for i in range(4):
        for j in range(4):
            assert torch.isclose(table[i, j], (gate[j] @ rows[i]).norm(), atol=1e-5)


@given(st.integers(2, 6), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 99), st.booleans())
def test_zero_exactly_where_the_diagonal_rules_row_and_column(count, alpha, seed, dominant):
    table = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)) + 0.1
    if dominant:
        table.fill_diagonal_(1.2 / alpha)
    diagonal = alpha * table.diagonal()
    off = table.masked_fill(torch.eye(count, dtype=torch.bool), 0)
    rules = bool((off.amax(1) <= diagonal).all() and (off.amax(0) <= diagonal).all())
    assert (float(excess(table, alpha)) == 0) is rules
    brute = sum(
        max(float(table[i, j] - diagonal[i]), 0) + max(float(table[j, i] - diagonal[i]), 0)
        for i in range(count)
        for j in range(count)
        if i != j
    )
    assert float(excess(table, alpha)) == pytest.approx(brute / count**2, abs=1e-5)


def test_margins_are_half_the_relative_distance_to_the_nearest_row():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.5]])
    assert torch.allclose(margins(rows), torch.tensor([0.25, 3.25**0.5 / 4, 0.25 / 1.25**0.5]))
    assert margins(torch.ones(3, 2)).tolist() == [0, 0, 0]
    assert margins(torch.zeros(2, 2)).tolist() == [0, 0]
    assert margins(torch.ones(1, 4)).tolist() == [0]


def test_gradients_are_those_of_differences_and_reach_rows_and_gates_only():
    torch.manual_seed(1)
    rows, gate_up = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 10, 6, dtype=torch.float64)
    term = Coupling(SITE, noise=False)
    seen = layer(rows, gate_up)
    term(seen).backward()
    found = seen.experts.gate_up_proj.grad
    assert bool((found[:, 5:] == 0).all())
    given = [tensor.detach().clone().requires_grad_() for tensor in (rows, gate_up[:, :5])]
    assert torch.autograd.gradcheck(lambda r, g: excess(responses(r, g)), given, eps=1e-6)
    assert bool((seen.router.scorer.weight.grad != 0).any())


def test_noise_stays_within_the_margins_and_is_there_only_while_training(monkeypatch):
    torch.manual_seed(2)
    rows, gate_up = torch.randn(4, 6), torch.randn(4, 10, 6)
    term, seen, kept = Coupling(SITE), layer(rows, gate_up), []
    monkeypatch.setattr("moekit.nn.coupling.responses", lambda r, g: kept.append(r.detach()) or responses(r, g))
    for _ in range(20):
        term.train()(seen)
    ratio = torch.stack(kept) / rows
    limit = margins(rows)[:, None]
    assert bool(((ratio - 1).abs() <= limit + 1e-6).all())
    assert float((ratio - 1).abs().max()) > 0.5 * float(limit.max())
    assert float(term.eval()(seen).detach()) == pytest.approx(float(excess(responses(rows, gate_up[:, :5]))))


def test_training_on_the_loss_alone_couples():
    torch.manual_seed(3)
    seen = layer(torch.randn(4, 6) * 0.1, torch.randn(4, 10, 6) * 0.1)
    term = Coupling(SITE)
    parameters = [seen.router.scorer.weight, seen.experts.gate_up_proj]
    before, size = float(term.eval()(seen)), float(parameters[0].norm())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        term.train()(seen).backward()
        optimizer.step()
    assert float(term.eval()(seen)) < 0.02 * before
    assert float(parameters[0].norm()) > 0.5 * size  # not by shrinking the rows


def test_experts_of_other_kinds_have_no_part():
    seen = layer(torch.eye(6), torch.cat([torch.eye(6)[:4, None].repeat(1, 5, 1), torch.zeros(4, 5, 6)], 1))
    assert float(Coupling(SITE, noise=False)(seen)) == 0


def test_in_a_model(tmp_path):
    model = lives(tmp_path, balance={"coupling": 1.0, "load": 0.01}, others=["zero"])
    model.train()
    ids = tokens()
    assert float(model(ids, labels=ids).losses["coupling"]) > 0


def test_any_checkpoint_is_measured():
    lm = tiny()
    block = blocks(lm)[0]
    layer_ = lm.model.layers[0].mlp
    rows, gate = coupled(layer_.gate, layer_.experts)
    table, eps = measured(block)
    torch.testing.assert_close(table, responses(rows, gate))
    torch.testing.assert_close(eps, margins(rows))
    stock, _ = families.build("mixtral")
    block = blocks(stock)[0]
    table, _ = measured(block)
    for i, j in itertools.product(range(block.num_experts), repeat=2):
        gate_j = block.bank().expert(j).gate_up[: block.bank().intermediate_size]
        torch.testing.assert_close(table[i, j], (gate_j @ block.router_module.weight[i]).norm())
    with pytest.raises(UnsupportedModelError, match=r"of model.layers.0.mlp is not one matrix \[4, 32\]"):
        measured(blocks(tiny(router={"score": {"kind": "mlp", "width": 7}}))[0])


def test_what_it_needs_is_told():
    ids = tokens()
    with pytest.raises(OptionError, match="one row per expert, and MLP has none"):
        tiny(balance={"coupling": 1.0}, router={"score": {"kind": "mlp", "width": 7}}).train()(ids, labels=ids)
    with pytest.raises(OptionError, match="gate projections, and ModulatedExperts has none"):
        tiny(balance={"coupling": 1.0}, experts="modulated").train()(ids, labels=ids)
    with pytest.raises(OptionError, match="alpha=0 of a coupling loss must be positive"):
        Coupling(SITE, alpha=0)
