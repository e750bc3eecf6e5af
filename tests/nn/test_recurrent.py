"""Routers that remember earlier layers: recurrent state, gating residuals."""

import pytest
import torch
from torch import nn
from wholes import leaks, lives, tiny, tokens

from moekit.contract import Context
from moekit.errors import OptionError
from moekit.nn.flow import Carry
from moekit.nn.parts import Site, one_model
from moekit.nn.recurrent import Recurrent, Residual

SITES = [Site(hidden_size=6, intermediate_size=4, num_experts=5, layer=i, num_layers=3) for i in range(3)]
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def passing():
    return Context(extra={"carry": Carry()})


def random(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def scorers(**options):
    with one_model():
        sites = [Site(hidden_size=6, intermediate_size=4, num_experts=5, layer=i, num_layers=3) for i in range(3)]
        return [random(Recurrent(site, width=4, **options)) for site in sites]


@pytest.mark.parametrize(("cell", "reference"), [("gru", nn.GRU), ("rnn", nn.RNN)])
def test_layers_are_the_time_steps_of_one_recurrent_network(cell, reference):
    layers, context = scorers(cell=cell), passing()
    found = [layer(X, context) for layer in layers]
    whole = reference(4, 4)
    theirs = {f"{name}_l0": p for name, p in layers[0].cell.state_dict().items()}
    whole.load_state_dict(theirs)
    states, _ = whole(torch.stack([layer.inner(X) for layer in layers]))
    for layer, state, logits in zip(layers, states, found, strict=True):
        torch.testing.assert_close(logits, state @ layer.weight.T)


def test_one_cell_for_all_layers_of_a_model_and_none_between_models():
    layers = scorers()
    assert layers[0].cell is layers[2].cell
    assert layers[0].cell is not scorers()[0].cell
    assert Recurrent(SITES[0]).cell is not Recurrent(SITES[1]).cell


def test_the_gradient_passes_through_depth_unless_detached():
    for detach in (False, True):
        layers, context = scorers(detach=detach), passing()
        logits = [layer(X, context) for layer in layers]
        logits[2].sum().backward()
        assert (layers[0].inner.weight.grad is None) == detach


def test_the_state_begins_anew_with_every_pass_and_tokens_are_apart():
    (first, second, _), context = scorers(), passing()
    first(X, context)
    both = second(X, context)
    assert not torch.allclose(both, second(X, passing()))
    alone = passing()
    first(X[3:4], alone)
    torch.testing.assert_close(second(X[3:4], alone), both[3:4])


def test_residual_adds_the_mapped_logits_of_the_layer_before():
    first, second, third = (random(Residual(site)) for site in SITES)
    context = passing()
    one, two, three = first(X, context), second(X, context), third(X, context)
    assert first.map is None
    torch.testing.assert_close(one, X @ first.scorer.weight.T)
    torch.testing.assert_close(two, X @ second.scorer.weight.T + one @ second.map.weight.T)
    torch.testing.assert_close(three, X @ third.scorer.weight.T + two @ third.map.weight.T)


def test_a_zero_map_is_the_plain_router():
    routers = {"score": "residual"}, {"score": "linear"}
    residual, plain = (tiny(router=router) for router in routers)
    for layer in residual.model.layers[1:]:
        nn.init.zeros_(layer.mlp.gate.scorer.map.weight)
    for ours, theirs in zip(residual.model.layers, plain.model.layers, strict=True):
        scorer = ours.mlp.gate.scorer.scorer
        ours.load_state_dict(theirs.state_dict(), strict=False)
        scorer.weight.data.copy_(theirs.mlp.gate.scorer.weight)
    residual.model.embed_tokens.load_state_dict(plain.model.embed_tokens.state_dict())
    torch.testing.assert_close(residual(tokens()).logits, plain(tokens()).logits)


def test_layers_without_a_router_leave_the_state_alone():
    with_dense = tiny(router={"score": {"kind": "recurrent", "width": 3}}, num_hidden_layers=3, dense_layers=[1])
    seen = []
    cell = with_dense.model.layers[0].mlp.gate.scorer.cell
    cell.register_forward_hook(lambda module, args, out: seen.append((args[1], out)))
    with_dense(tokens())
    assert len(seen) == 2
    assert seen[0][0] is None
    assert seen[1][0] is seen[0][1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("score", [{"kind": "recurrent", "width": 6}, {"kind": "recurrent", "width": 6, "cell": "rnn"}])
def test_a_recurrent_router_lives_and_its_cell_is_kept_once(tmp_path, score, tied):
    model = lives(tmp_path, router={"score": score}, num_hidden_layers=3, tie_word_embeddings=tied)
    cells = [name for name, _ in model.named_parameters() if ".cell." in name]
    assert len(cells) == 4
    assert not leaks(model)


def test_gating_residuals_live_with_other_kinds_of_experts(tmp_path):
    model = lives(tmp_path, router={"score": "residual"}, others=["zero", "copy", "constant"], num_experts_per_tok=4)
    assert not leaks(model)


@pytest.mark.parametrize("score", ["residual", {"kind": "recurrent", "width": 4}])
def test_recomputation_gives_the_same_gradients(score):
    found = []
    for again in (False, True):
        model = tiny(router={"score": score}, balance={"load": 0.1}).train()
        if again:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"kind": "recurrent", "width": 0}, "width=0 of a recurrent router: give 1 or more"),
        ({"kind": "recurrent", "cell": "lstm"}, "cell='lstm' of a recurrent router: choose one of gru, rnn"),
        ({"kind": "residual", "of": "nothing"}, "scorer 'nothing' is not known"),
    ],
)
def test_bad_options(score, message):
    with pytest.raises(OptionError, match=message):
        tiny(router={"score": score})


@pytest.mark.parametrize("score", [{"kind": "recurrent", "width": 5}, "residual"])
def test_routers_of_attention_and_of_experts_remember_apart(score):
    """Other sizes in either place, and the experts' routing does not change with what attention's router remembers."""
    other = {"kind": "recurrent", "width": 3} if score != "residual" else "residual"
    attention = {"kind": "experts", "experts": 3, "k": 1, "router": {"score": other}}
    model = tiny(attention=attention, router={"score": score}, num_hidden_layers=3)
    context, x = passing(), torch.randn(6, 32)
    gates = [layer.mlp.gate for layer in model.model.layers]
    expected = [gate.score(x, context) for gate in gates]
    context = passing()
    for layer, logits in zip(model.model.layers, expected, strict=True):
        layer.self_attn.router(x, context)
        torch.testing.assert_close(layer.mlp.gate.score(x, context), logits)
    assert model(tokens()).logits.isfinite().all()


def test_residuals_need_as_many_choices_everywhere():
    model = tiny(router={"score": "residual"}, num_experts=[4, 5])
    with pytest.raises(OptionError, match="as many choices in every layer: 5 follow 4"):
        model(tokens())
