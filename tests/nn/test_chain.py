"""Several passes over the experts of one layer."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moekit
from moekit.errors import OptionError, UnsupportedModelError
from moekit.nn import MoE, MoekitConfig, MoekitForCausalLM, finish_step
from moekit.nn.chain import Again, Chain
from moekit.nn.config import Site
from moekit.nn.experts import FeedForward
from moekit.nn.flow import begin

SITE = Site(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
H = 8


def model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": H, "moe_intermediate_size": 6, "num_experts": 4, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "initializer_range": 0.4}
    return MoekitForCausalLM(MoekitConfig(**sizes, **heads, **options)).eval()


def parts(**options):
    """A chained layer's (hidden, norm, sublayer, wiring)."""
    layer = model(wiring={"kind": "chain", **options}, shared_expert_intermediate_size=5).model.layers[0]
    return torch.randn(2, 3, H), layer.post_attention_layernorm, layer.mlp, layer.wiring


def context():
    return begin(2, 3, torch.device("cpu"))


def test_one_pass_is_the_plain_layer_on_the_normed_stream():
    hidden, norm, sublayer, wiring = parts(passes=1)
    x = norm(hidden)
    torch.testing.assert_close(wiring(hidden, norm, sublayer, context()), x + sublayer(x, context()))


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_passes_by_hand(inner, outer):
    hidden, norm, sublayer, wiring = parts(passes=3, inner=inner, outer=outer)
    x = norm(hidden)
    for layer in (sublayer, *wiring.later):
        routed = copy.deepcopy(sublayer)
        routed.gate = layer.gate
        x = routed(x, context()) + (x if inner else 0)
    torch.testing.assert_close(wiring(hidden, norm, sublayer, context()), x + (hidden if outer else 0))


def test_every_pass_has_a_router_of_its_own_unless_told_otherwise():
    _, _, sublayer, wiring = parts(passes=3)
    weights = [layer.gate.scorer.weight for layer in (sublayer, *wiring.later)]
    assert not any(torch.equal(a, b) for a, b in [(weights[0], weights[1]), (weights[1], weights[2])])
    hidden, norm, sublayer, wiring = parts(passes=3, own_routers=False)
    assert len(wiring.later) == 0
    x = norm(hidden)
    for _ in range(3):
        x = x + sublayer(x, context())
    torch.testing.assert_close(wiring(hidden, norm, sublayer, context()), x)


def test_what_routers_have_in_common_passes_have_too():
    chained = model(wiring={"kind": "chain", "passes": 3}, router={"score": {"kind": "recurrent", "width": 5}})
    scorers = [layer.gate.scorer for layer in chained.modules() if isinstance(layer, MoE)]
    assert len(scorers) == 2 * 3
    assert len({id(scorer.cell) for scorer in scorers}) == 1
    assert len({id(scorer.weight) for scorer in scorers}) == 2 * 3


def test_experts_are_the_parameters_of_one_module():
    plain, chained = model(), model(wiring={"kind": "chain", "passes": 3})
    routers = 2 * 2 * 4 * H
    assert sum(p.numel() for p in chained.parameters()) == sum(p.numel() for p in plain.parameters()) + routers
    assert not any("later" in name and "experts" in name for name in chained.state_dict())


def test_views_by_one_of_several_routers_are_refused():
    says = r"model.layers.0.wiring.later.0 routes to model.layers.0.mlp.experts too: layers with several routers"
    with pytest.raises(UnsupportedModelError, match=says):
        moekit.blocks(model(wiring={"kind": "chain", "passes": 2}))
    chained, seen = model(wiring={"kind": "chain", "passes": 2, "own_routers": False}), []
    with moekit.blocks(chained)[1].observe(seen.append):
        chained(torch.randint(0, 40, (2, 7)))
    assert len(seen) == 2  # both passes through the one router


def test_every_pass_is_looked_at_by_itself():
    chained, seen = model(wiring={"kind": "chain", "passes": 2}), []
    views = moekit.blocks(chained, shared=True)
    assert [view.name for view in views[:2]] == ["model.layers.0.mlp", "model.layers.0.wiring.later.0"]
    assert {view.layer for view in views} == {0, 1}
    with views[1].observe(seen.append), torch.no_grad():
        load = chained(torch.randint(0, 40, (2, 7))).expert_load[1]
    (second,) = seen
    assert torch.equal(torch.bincount(second.routing.expert.flatten(), minlength=len(load)), load)


class Silent(nn.Module):
    def forward(self, x, expert, weight):
        return torch.zeros_like(x)


def test_a_replaced_bank_is_used_by_all_passes():
    hidden, norm, sublayer, wiring = parts(passes=2)
    sublayer.experts = Silent()
    sublayer.shared_expert = None
    torch.testing.assert_close(wiring(hidden, norm, sublayer, context()), norm(hidden))


def test_all_passes_are_balanced_corrected_and_trained():
    chained = model(
        wiring={"kind": "chain", "passes": 2},
        balance={"load": {"weight": 0.5, "scope": "sequence"}},
        correction={"rate": 0.1},
        router={"weigh": {"kind": "scores", "normalise": False}},
    )
    ids = torch.randint(0, 40, (2, 9))
    out = chained.train()(ids, labels=ids)
    assert len(out.expert_load) == 4
    assert out.losses["load"] > 0.5 * 4 * 0.9  # each pass of each layer adds its own term, 1 or nearly so
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in chained.parameters())
    finish_step(chained)
    for layer in chained.modules():
        if isinstance(layer, MoE):
            assert bool(layer.gate.bias.any())
            assert not bool(layer.tally.count_E.any())


def test_saving_copying_generating_and_recomputing(tmp_path):
    chained = model(wiring={"kind": "chain", "passes": 2}, correction={})
    ids = torch.randint(0, 40, (2, 7))
    expected = chained(ids).logits
    chained.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    twin = copy.deepcopy(chained)
    with torch.no_grad():
        chained.model.layers[0].mlp.experts.down_proj.zero_()
    torch.testing.assert_close(twin(ids).logits, expected)  # its passes run over its own experts
    run = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(twin.generate(ids, **run), twin.generate(ids, use_cache=False, **run))
    twin.train()(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in twin.named_parameters()}
    twin.zero_grad()
    twin.gradient_checkpointing_enable()
    twin(ids, labels=ids).loss.backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def test_a_single_token_and_none():
    _, norm, sublayer, wiring = parts(passes=2)
    for batch, length in ((1, 1), (0, 1)):
        hidden = torch.randn(batch, length, H)
        assert wiring(hidden, norm, sublayer, begin(batch, length, hidden.device)).shape == hidden.shape


def test_bad_options():
    with pytest.raises(OptionError, match=r"passes=0 of a chain: give a whole number from 1 on"):
        model(wiring={"kind": "chain", "passes": 0})
    with pytest.raises(OptionError, match="runs over an MoE layer, and this sublayer is a FeedForward"):
        Chain(SITE, FeedForward(8, 4))
    assert all(layer.mlp is layer.wiring.later[0]._owner[0] for layer in model(wiring="chain").model.layers)
    assert issubclass(Again, MoE)
