"""Dense specialists put together, and a plan that freezes and releases parts."""

import pytest
import torch

from moekit.build._specialists import assemble
from moekit.errors import OptionError, UnsupportedModelError
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.nn.schedule import Moment, Schedule

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
IDS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(5))


def dense(seed: int, width: int = 8) -> MoekitForCausalLM:
    torch.manual_seed(seed)
    return MoekitForCausalLM(MoekitConfig(**SIZES, intermediate_size=width, dense_layers=[0, 1])).eval()


def sparse(**fields) -> MoekitForCausalLM:
    torch.manual_seed(0)
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **fields}
    return MoekitForCausalLM(MoekitConfig(**SIZES, **options)).eval()


@torch.no_grad()
def test_copies_of_one_specialist_compute_what_it_does():
    model, source = sparse(), dense(1)
    assemble(model, [source])
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [0, 1])
def test_each_expert_is_its_specialists_layer(chosen):
    first, second = dense(1), dense(2)
    layers = {name: p for name, p in second.state_dict().items() if ".mlp." in name}
    second.load_state_dict({**first.state_dict(), **layers})
    model = sparse(num_experts_per_tok=1)
    assemble(model, [first, second])
    for layer in model.model.layers:
        layer.mlp.gate.pool = torch.arange(4) % 2 == chosen
    torch.testing.assert_close(model(IDS).logits, (first, second)[chosen](IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("times", [1, 2])
def test_the_shared_expert_and_the_surroundings_are_means(times):
    both = [dense(1), dense(2)]
    model = sparse(shared_expert_intermediate_size=8 * times)
    assemble(model, both)
    averaged = dense(3)
    averaged.load_state_dict({name: (p + both[1].state_dict()[name]) / 2 for name, p in both[0].state_dict().items()})
    x = torch.randn(5, 16)
    for ours, theirs in zip(model.model.layers, averaged.model.layers, strict=True):
        torch.testing.assert_close(ours.mlp.shared_expert(x), theirs.mlp(x))
        torch.testing.assert_close(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
    torch.testing.assert_close(model.lm_head.weight, averaged.lm_head.weight)


def test_warming_up_changes_router_and_shared_expert_alone():
    model = sparse(shared_expert_intermediate_size=8).train()
    plan = [
        Schedule(model, pattern, {"kind": "steps", "values": [begin, True], "at": [0.5]})
        for pattern, begin in (
            ("model.trainable", False),
            ("*.mlp.gate.trainable", True),
            ("*.shared_expert.trainable", True),
        )
    ]
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(4):
        for schedule in plan:
            schedule.apply(Moment(step, 4))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        if step < 2:
            assert moved == {name for name in before if ".gate." in name or ".shared_expert." in name}
        else:
            assert moved == set(before)


@pytest.mark.parametrize(
    ("model", "specialists", "error", "message"),
    [
        ({}, [], OptionError, "no specialist to make experts of"),
        ({"moe_intermediate_size": 6}, [8], OptionError, "has experts of .* specialists of"),
        ({"shared_expert_intermediate_size": 12}, [8], OptionError, "shares an expert 12 wide, which layers 8 wide"),
        ({"num_attention_heads": 4, "head_dim": 2}, [8], OptionError, "is not the same size in the model and"),
        ({"dense_layers": [0], "intermediate_size": 8}, [8], UnsupportedModelError, "has no experts in the model"),
    ],
)
def test_what_does_not_fit(model, specialists, error, message):
    fields = {**SIZES, "num_experts": 4, "moe_intermediate_size": 8, **model}
    with pytest.raises(error, match=message):
        assemble(MoekitForCausalLM(MoekitConfig(**fields)), [dense(1, width) for width in specialists])
