"""Read-ME: slices are the dense layer on a mask, one choice runs all layers, the known queue is what is served."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moekit.errors import OptionError
from moekit.run._batches import expert_batches
from moekit.run.policy import policy
from moekit.run.read_me import (
    AlignedFFN,
    PreRouter,
    Routed,
    distinct,
    hidden,
    importance,
    in_order,
    overlap_target,
    queue,
    routing_distillation,
    served,
    top_half,
)
from moekit.run.replay import replay
from moekit.train import TrainOptions, batches_of, train

VOCABULARY, UNITS, DOMAINS = 40, 32, 3
IDS = torch.randint(0, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=UNITS,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double().eval()


def dense(model):
    return [layer.mlp for layer in model.model.layers]


def random_masks(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [top_half(torch.rand(DOMAINS, UNITS, generator=draw)) for _ in range(3)]


def split(model, masks):
    layers = [AlignedFFN(layer, mask) for layer, mask in zip(dense(model), masks, strict=True)]
    for holder, layer in zip(model.model.layers, layers, strict=True):
        holder.mlp = layer
    return layers


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def test_importance_is_the_mean_of_what_down_proj_reads(model):
    seen = {}
    for at, layer in enumerate(dense(model)):
        gate, up = layer.gate_proj, layer.up_proj
        layer.register_forward_hook(
            lambda m, args, out, at=at, gate=gate, up=up: seen.setdefault(at, []).append(
                torch.nn.functional.silu(gate(args[0])) * up(args[0])
            )
        )
    found = importance(model, dense(model), list(IDS))
    for at, score_I in enumerate(found):
        expected = torch.cat([h.detach().flatten(0, -2) for h in seen[at]]).abs().mean(0)
        torch.testing.assert_close(score_I, expected)


def test_shared_and_domain_units_are_the_dense_layer_on_that_mask(model):
    """What is shared runs once, never twice; what belongs to no domain is gone."""
    for layer, mask_NI in zip(dense(model), random_masks(), strict=True):
        shared_I = mask_NI.all(0)
        assert 0 < int(shared_I.sum()) < int(mask_NI[0].sum())
        cut, x_TH = AlignedFFN(layer, mask_NI), torch.randn(6, 16).double()
        assert cut.shared["down"].shape[1] == int(shared_I.sum())
        with torch.no_grad():
            h_TI = layer.act_fn(layer.gate_proj(x_TH)) * layer.up_proj(x_TH)
            for domain, mask_I in enumerate(mask_NI):
                cut.route = torch.full((6,), domain)
                torch.testing.assert_close(cut(x_TH), (h_TI * mask_I) @ layer.down_proj.weight.T)


def test_with_every_unit_everywhere_it_is_the_dense_model_bit_for_bit(model):
    expected = logits(model)
    layers = split(model, [torch.ones(DOMAINS, UNITS, dtype=torch.bool)] * 3)
    with Routed(model, layers, PreRouter(VOCABULARY, DOMAINS)):
        assert torch.equal(logits(model), expected)


def test_one_index_runs_all_layers_and_follows_from_the_tokens_read_so_far(model):
    layers, router = split(model, random_masks()), PreRouter(VOCABULARY, DOMAINS, window=8, seed=3)
    with Routed(model, layers, router):
        logits(model)
        first = layers[0].route
        assert all(torch.equal(layer.route, first) for layer in layers)
        assert len(first.unique()) > 1
        assert torch.equal(first, router(IDS).argmax(-1).flatten())
        changed = IDS.clone()
        changed[:, 6:] = 1
        logits(model, changed)
        assert torch.equal(layers[0].route.view(2, -1)[:, :6], first.view(2, -1)[:, :6])
        got, route = logits(model), router(IDS).argmax(-1).flatten()
    assert not hasattr(model, "pre_router")
    assert layers[0].route is None
    # by hand: tokens one expert at a time, each as a whole model of that mask
    hooks = [model.register_forward_pre_hook(lambda *_: [setattr(layer, "route", route) for layer in layers] and None)]
    torch.testing.assert_close(logits(model), got)
    hooks[0].remove()


def test_a_cache_is_refused(model):
    layers = split(model, random_masks())
    with torch.no_grad(), Routed(model, layers, PreRouter(VOCABULARY, DOMAINS)):
        output = model(input_ids=IDS, use_cache=True)
        with pytest.raises(OptionError, match="reads whole sequences: call it with use_cache=False"):
            model(input_ids=IDS[:, :1], past_key_values=output.past_key_values)


def test_targets_are_overlaps_and_the_loss_is_least_at_them():
    mask_NI = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    h_TI = torch.tensor([[-5.0, 4.0, 0.1, 0.0], [0.0, 0.1, 2.0, -3.0]])
    q_TN = overlap_target(h_TI, mask_NI)
    torch.testing.assert_close(q_TN, torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]).softmax(-1))
    assert float(routing_distillation(q_TN.log(), [h_TI], [mask_NI])) == pytest.approx(0, abs=1e-6)
    other = torch.zeros(2, 3)
    expected = (q_TN * (q_TN.log() + np.log(3))).sum(1).mean()
    assert float(routing_distillation(other, [h_TI, h_TI], [mask_NI] * 2)) == pytest.approx(
        2 * float(expected), rel=1e-5
    )


def test_the_router_learns_through_the_one_loop(model):
    masks, reference = random_masks(), model
    layers = dense(model)
    router = PreRouter(VOCABULARY, DOMAINS).double()
    model.add_module("pre_router", router)
    before = model.model.embed_tokens.weight.clone()

    def loss(model, batch):
        with torch.no_grad():
            h = hidden(reference, layers, batch["input_ids"])
        return routing_distillation(router(batch["input_ids"]).flatten(0, 1), h, masks), {}

    options = TrainOptions(steps=20, learning_rate=1e-2)
    record = train(model, loss, batches_of(list(IDS), 2), options, what=["pre_router.*"])
    assert record.losses[-1] < 0.7 * record.losses[0]
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_top_half_is_exact_and_checked():
    assert top_half(torch.tensor([1.0, 3.0, 3.0, 3.0])).tolist() == [False, True, True, False]
    with pytest.raises(OptionError, match="a share of 0 of the hidden units"):
        top_half(torch.ones(4), 0)


def test_the_known_queue_is_prefetched_exactly_and_batches_by_expert_need_fewer():
    draw = np.random.default_rng(0)
    expert_T = draw.choice(6, 200, p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05]).tolist()
    batches, fifo = expert_batches(expert_T, 16), in_order(200, 16)
    assert sorted(token for batch in batches for token in batch) == list(range(200))
    assert [len(batch) for batch in fifo] == [16] * 12 + [8]
    assert distinct(expert_T, batches) < distinct(expert_T, fifo)
    assert distinct(expert_T, batches) >= np.ceil(16 / max(np.bincount(expert_T)))
    future = queue(expert_T, fifo, layers=3, experts=6)
    for request in future.requests:
        own = {expert_T[token] for token in fifo[request.start // 16]}
        assert set(request.experts) == own
    least = served(future, 9).misses
    assert all(least <= replay(future, policy(name), 9).misses for name in ("lru", "lfu", "arc"))
    ahead = served(future, 12, width=6)
    assert (ahead.misses, ahead.useless_prefetch_bytes) == (0, 0)


def test_the_rule_of_the_experiment_can_fail_in_each_of_its_parts():
    from moekit.lab.experiments.read_me import holds, summary

    def seed(pruned, random, order):
        bits = {"pruned": pruned, "random": random, "read-me": 2.0}
        return {"bits per byte": bits, "experts per batch": {"in order": order, "by expert": 1.0}}

    def found(*one):
        return holds(summary([seed(*one), seed(*(value + 0.01 for value in one)), seed(*one)]))

    assert found(2.5, 2.5, 3.0)
    assert not found(1.9, 2.5, 3.0)
    assert not found(2.5, 1.9, 3.0)
    assert not found(2.5, 2.5, 0.9)
