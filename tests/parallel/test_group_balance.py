"""Balance over a group of ranks is that of one process with the group's tokens; norms keep a deep stream small."""

import math

import pytest
import rank_group_balance
import torch
from rank_attach import SIZES
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.errors import OptionError, UnsupportedModelError
from moekit.parallel._sandwich import layers_of, sandwiched, tiny_init


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_term_of_a_group(four_ranks, size):
    for found in four_ranks.ask(rank_group_balance.equals, size):
        assert found["value"] < 1e-12
        assert found["gradient"] < 1e-12


def test_a_model_of_two_ranks(two_ranks):
    for found in two_ranks.ask(rank_group_balance.model_equals):
        assert found["value"] < 1e-6  # routers compute in float32
        assert found["gradient"] < 1e-7


def deep(layers, hidden=16):
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": layers, "hidden_size": hidden, "initializer_range": 1.0, "num_experts": 4}
    net = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).double().eval()
    net.set_experts_implementation("eager")
    return net


def streams(net):
    """Mean squares of the residual stream before the first layer and after the last, and of every sublayer's output."""
    found, added = [], []
    layers = layers_of(net)
    layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0].square().mean()))
    layers[-1].register_forward_hook(lambda module, args, out: found.append(_first(out).square().mean()))
    for layer in layers:
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(lambda module, args, out: added.append(_first(out).square().mean(-1)))
    with torch.no_grad():
        net(torch.randint(1, 31, (4, 9), generator=torch.Generator().manual_seed(1)), use_cache=False)
    return [float(x) for x in found], added


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def test_every_sublayer_adds_the_same_little_bit():
    net = deep(6)
    assert len(sandwiched(net, 16, gain=0.5)) == 12
    _, added = streams(net)
    for one in added:
        torch.testing.assert_close(one, torch.full_like(one, 0.25 / 6), rtol=1e-3, atol=0)


def test_the_stream_does_not_grow_with_depth():
    """2 L sublayers of mean square c^2 / L add 2 c^2 at any depth; without the norms the stream grows with it."""
    grown = {True: [], False: []}
    for layers in (4, 16):
        for with_norms in (True, False):
            net = deep(layers)
            if with_norms:
                sandwiched(net, 16)
            (before, after), _ = streams(net)
            grown[with_norms].append(after - before)
    assert all(abs(growth - 2) < 1 for growth in grown[True])
    assert grown[False][1] > 2 * grown[False][0]


def test_norms_are_parameters_and_learn():
    net = deep(2)
    norms = sandwiched(net, 16, gain=2.0)
    names = [name for name, _ in net.named_parameters() if "sandwich_norm" in name]
    assert len(names) == len(norms) == 4
    torch.testing.assert_close(norms[0].weight, torch.full((16,), 2 / math.sqrt(2), dtype=torch.float64))
    ids = torch.ones(1, 4, dtype=torch.int64)
    net(ids, labels=ids).loss.backward()
    assert all(norm.weight.grad.abs().sum() > 0 for norm in norms)
    with pytest.raises(OptionError, match="has sandwich norms already"):
        sandwiched(net, 16)


def test_tiny_init():
    net = deep(8)
    gains = [p.clone() for p in net.parameters() if p.dim() == 1]
    assert tiny_init(net, 16, seed=3) == pytest.approx(math.sqrt(1 / (2 * 16 * 8)))
    values = torch.cat([p.detach().reshape(-1) for p in net.parameters() if p.dim() > 1])
    assert float(values.std()) == pytest.approx(1 / 16, rel=0.02)
    assert all(torch.equal(a, b) for a, b in zip(gains, (p for p in net.parameters() if p.dim() == 1), strict=True))


def test_mistakes():
    with pytest.raises(OptionError, match="gain=0 of the sandwich norms"):
        sandwiched(deep(2), 16, gain=0)
    with pytest.raises(UnsupportedModelError, match="DecoderLayer has no list of layers"):
        layers_of(deep(2).model.layers[0])
