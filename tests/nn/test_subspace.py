"""Experts as column choices of one backbone: what they compute, what reaches the topology, what conflicts."""

import math

import pytest
import torch
import torch.nn.functional as F
from wholes import lives, tiny, tokens

from moekit.contract import Context, Routing
from moekit.errors import OptionError
from moekit.nn import MoE, Router, Seen, Site, Standalone, finish_step
from moekit.nn.subspace import Conflict, Connections, SubspaceExperts

SITE = Site(hidden_size=6, intermediate_size=5, num_experts=4, top_k=2)
FIELDS = {
    "experts": "subspace",
    "router": {"weigh": "chosen"},
    "balance": {"conflict": 10.0, "connections": {"weight": 1e-4}},
}


def bank(seed=0, **options):
    torch.manual_seed(seed)
    experts = SubspaceExperts(Standalone(), SITE, **options)
    experts.initialise(0.02)
    return experts.train()


def test_start_is_a_block_of_its_own_and_an_orthogonal_backbone():
    experts = bank()
    assert experts.width == 24
    assert experts.columns == math.floor(24 / 2)
    assert torch.allclose(experts.up.T @ experts.up, torch.eye(6), atol=1e-5)
    order, strength = experts.chosen()
    for expert in range(4):
        assert set(range(expert * 6, expert * 6 + 6)) <= set(order[expert].tolist())  # its own block comes first
        assert len(set(order[expert].tolist())) == 12
    assert bool((strength > 0.5).all())
    assert bool((experts.topology.diagonal() == 1).all())


def test_equals_the_formula_and_the_eager_loop():
    experts, x = bank(1), torch.randn(10, 6)
    index, weight = torch.randint(0, 5, (10, 2)), torch.rand(10, 2)  # the id 4 marks an unused slot
    weight = weight * (index < 4)
    expected = torch.zeros(10, 6)
    order, _ = experts.chosen()
    influence = experts.topology.sigmoid().repeat_interleave(6, dim=1)
    for t in range(10):
        for k in range(2):
            if (e := int(index[t, k])) < 4:
                s = order[e]
                y = F.silu(x[t] @ experts.up.T[:, s]) @ experts.down[s] * influence[e, s].mean()
                expected[t] += weight[t, k] * y
    assert torch.allclose(experts(x, index, weight), expected, atol=1e-5)
    experts.config = type("Eager", (), {"_experts_implementation": "eager"})()
    assert torch.allclose(experts(x, index, weight), expected, atol=1e-5)


def test_all_columns_is_one_dense_layer_whoever_is_chosen():
    experts, x = bank(2, columns=24), torch.randn(5, 6)
    with torch.no_grad():
        experts.topology.fill_(2.0)
    dense = F.silu(x @ experts.up.T) @ experts.down * torch.tensor(2.0).sigmoid()
    for expert in range(4):
        out = experts(x, torch.full((5, 1), expert), torch.ones(5, 1))
        assert torch.allclose(out, dense, atol=1e-5)


def test_ties_go_to_the_lower_column():
    experts = bank(3)
    with torch.no_grad():
        experts.topology.zero_()
    assert experts.chosen()[0].tolist() == [list(range(12))] * 4


def test_the_loss_reaches_the_topology_through_the_mean_influence():
    experts, x = bank(4), torch.randn(8, 6)
    experts(x, torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1)).square().sum().backward()
    assert bool((experts.topology.grad[0] != 0).any())
    assert bool((experts.topology.grad[1:] == 0).all())


def conflict_by_hand(experts, grads):
    """relu(-cos) over shared columns, pair by pair."""
    order = experts.chosen()[0].tolist()
    out = torch.zeros(4, 4)
    for i in range(4):
        for j in range(4):
            both = sorted(set(order[i]) & set(order[j]))
            if i != j and both:
                a = torch.cat([grads[i][order[i].index(c)] for c in both])
                b = torch.cat([grads[j][order[j].index(c)] for c in both])
                size = float(a.norm() * b.norm())
                out[i, j] = max(-float(a @ b) / size, 0) if size else 0
    return out


def test_conflict_is_the_cosine_of_last_steps_gradients_on_shared_columns():
    experts = bank(5)
    x = torch.randn(12, 6)
    index = torch.arange(12)[:, None] % 3  # the last expert is not used
    target = torch.randn(12, 6)
    assert bool((experts.conflict == 0).all())
    grads = torch.zeros(4, 12, 6)
    for half in (slice(0, 6), slice(6, 12)):  # two micro-batches make one step
        up = experts.up_proj
        up.retain_grad()
        hidden = F.silu(torch.einsum("th,trh->tr", x[half], up[index[half, 0]]))
        out = torch.einsum("tr,thr->th", hidden, experts.down_proj[index[half, 0]])
        (out - target[half]).square().sum().backward()
        grads += up.grad
    expected = conflict_by_hand(experts, grads)
    assert bool((experts.conflict == 0).all())  # until the step is finished
    finish_step(experts)
    assert torch.allclose(experts.conflict, expected, atol=1e-5)
    assert bool((experts.conflict[3] == 0).all())
    assert float(experts.conflict.max()) > 0
    assert experts._grad is None


def test_opposed_experts_are_pulled_apart_and_agreeing_ones_are_not():
    """Two experts get opposite gradients on what they share, two the same: only the first pair's connections fall."""
    model = tiny(**FIELDS, num_hidden_layers=1).train()
    layer = model.model.layers[0].mlp
    layer.experts.conflict.zero_()
    layer.experts.conflict[0, 1] = layer.experts.conflict[1, 0] = 1.0
    before = layer.experts.topology.detach().clone()
    model(tokens(), labels=tokens()).losses["conflict"].backward()
    grad = layer.experts.topology.grad
    assert bool((grad[[0, 1], [1, 0]] > 0).all())
    assert int((grad != 0).sum()) == 2
    assert torch.equal(before, layer.experts.topology)


def test_both_terms_by_hand():
    """Conflicts count by the sigmoid of their connection (the released code has the connection itself), and only
    between experts that the batch uses."""
    router = Router(SITE)
    layer = MoE(router, bank(6))
    routing = Routing(torch.tensor([[0, 1], [1, 2], [0, 2]]), torch.ones(3, 2), torch.zeros(3, 4))
    seen = Seen(torch.zeros(3, 6), routing, router, layer.experts, Context())
    with torch.no_grad():
        layer.experts.topology.copy_(torch.randn(4, 4))
        layer.experts.conflict.copy_(torch.rand(4, 4).fill_diagonal_(0))
    a, share = layer.experts.topology, layer.experts.topology.sigmoid()
    conflict = sum(share[i, j] * layer.experts.conflict[i, j] for i in range(3) for j in range(3))
    assert torch.allclose(Conflict(SITE)(seen), conflict)
    assert torch.allclose(Connections(SITE, undecided=3.0)(seen), (a.abs() + 3 * share * (1 - share)).mean())


def test_in_a_model(tmp_path):
    model = lives(tmp_path, **FIELDS)
    bank = model.model.layers[0].mlp.experts
    assert float(bank.conflict.max()) > 0
    assert bank.active_parameters() == 2 * (2 * bank.columns * 32 + 4)
    assert tiny(**FIELDS).train()(tokens(1, 1), labels=tokens(1, 1)).losses["connections"].isfinite()


def test_recomputation_hears_every_gradient_once():
    found = []
    for again in (False, True):
        model = tiny(**FIELDS).train()
        if again:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        finish_step(model)
        found.append(model.model.layers[1].mlp.experts.conflict.clone())
    assert torch.allclose(*found, atol=1e-6)
    assert float(found[0].max()) > 0


def test_bad_options():
    with pytest.raises(OptionError, match="a backbone of 10 columns does not divide into 4 equal blocks"):
        bank(width=10)
    with pytest.raises(OptionError, match="columns=99 of an expert: the backbone has 24"):
        bank(columns=99)
    with pytest.raises(OptionError, match="needs experts of the kind subspace, and the layer has Experts"):
        tiny(balance={"conflict": 1.0}).train()(tokens(), labels=tokens())
