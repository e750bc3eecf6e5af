"""What the toy experiments about kinds of layers draw and count, and their rules."""

import pytest
import torch

from figures import changed
from moekit.lab.experiments import hecto, mixture_of_mamba, moduleformer, monet, ultramem_v2
from moekit.lab.experiments._league import contestant
from moekit.nn.flow import begin


def test_sequences_can_be_told_by_their_task_alone():
    ids, label, order = hecto.draw(500, torch.Generator().manual_seed(0))
    assert torch.equal(ids[:, 0] == hecto.SYMBOLS, order)
    body = ids[:, 1:]
    first = [int(row[row < 2][0]) for row in body[order]]
    assert first == label[order].tolist()
    assert all(sorted(row[row < 2].tolist()) == [0, 1] for row in body[order])  # the bag says nothing
    more = (body == 3).sum(1) > (body == 2).sum(1)
    assert torch.equal(more[~order].long(), label[~order])


@pytest.mark.parametrize("name", hecto.ARMS)
def test_pairs_of_experts_have_the_same_size(name):
    model = hecto.Classifier(name)
    assert model.size == pytest.approx(hecto.Classifier("mixed").size, rel=0.01)
    ids, *_ = hecto.draw(6, torch.Generator().manual_seed(1))
    context = begin(1, 6, ids.device)
    assert model(ids, context).shape == (6, 2)
    went = model.to_gru(context)
    assert went.shape == (6,)
    assert went.all() if name == "recurrent" else not went.any() if name == "feed-forward" else True


def test_a_memory_reads_less_than_experts_and_a_dense_layer_works_as_much():
    sizes = {name: ultramem_v2.sizes(ultramem_v2.layer(name)) for name in ultramem_v2.ARMS}
    assert sizes["dense"]["active"] >= sizes["memory"]["active"]
    assert sizes["experts"]["total"] >= sizes["memory"]["total"]
    assert sizes["experts"]["active"] >= sizes["memory"]["active"]
    assert sizes["memory"]["bytes of 256 tokens"] > sizes["memory"]["bytes of one token"]
    for figure in ("total", "active"):
        assert 1 <= sizes["experts alike"][figure] / sizes["memory"][figure] < 1.02


@pytest.mark.parametrize(
    ("name", "low", "high", "bytes_", "shown"),
    [
        (None, 0.0, 0.0, 10, True),
        ("memory - dense", -0.1, 0.1, 10, False),
        ("memory - experts", -0.2, -0.1, 10, False),
        (None, 0.0, 0.0, 30, False),
    ],
)
def test_the_rule_of_the_memory(name, low, high, bytes_, shown):
    rule = {"memory - dense": {"low": 0.1, "high": 0.2}, "memory - experts": {"low": -0.1, "high": 0.1}}
    sizes = {"memory": {"bytes of one token": bytes_}, "experts": {"bytes of one token": 20}}
    found = {"rule": rule | ({name: {"low": low, "high": high}} if name else {}), "sizes": sizes}
    assert ultramem_v2.holds(found) is shown


def test_images_turn_and_texts_follow_their_chain():
    world = mixture_of_mamba.World(3)
    symbol, patch, image = world.draw(4)
    stretch = mixture_of_mamba.STRETCH
    assert image.shape == symbol.shape == (4, mixture_of_mamba.STRETCHES * stretch)
    for row in range(4):
        for start in range(0, image.shape[1], stretch):
            own = slice(start, start + stretch)
            assert bool((image[row, own] == image[row, start]).all())
            if image[row, start]:
                left = [
                    (patch[row, start + 1 : start + stretch] - patch[row, start : start + stretch - 1] @ turn.T).std()
                    for turn in world.turn
                ]
                assert min(left) < 2 * mixture_of_mamba.NOISE < max(left)
            else:
                ids = symbol[row, own]
                assert all(ids[t] in world.follow[ids[t - 2], ids[t - 1]] for t in range(2, stretch))


def test_steps_to_a_level():
    course = [4.0, 2.0, 1.0]
    every = mixture_of_mamba.EVERY
    assert mixture_of_mamba.reached(course, 3.0) == every / 2
    assert mixture_of_mamba.reached(course, 1.0) == 2 * every
    assert mixture_of_mamba.reached(course, 0.5) == mixture_of_mamba.STEPS
    assert mixture_of_mamba.reached([4.0, 5.0, 1.0], 4.0) == every + every / 4


def test_losses_are_of_positions_inside_a_stretch():
    torch.manual_seed(0)
    reader = mixture_of_mamba.Reader(modalities=2)
    torch.nn.init.zeros_(reader.symbol_out.weight)  # what is said does not depend on what was read
    symbol, patch, image = mixture_of_mamba.World(3).draw(2)
    text = reader.losses(symbol, patch, image)["text"]
    place = torch.arange(symbol.shape[1]) % mixture_of_mamba.STRETCH
    other = (symbol + 5) % mixture_of_mamba.SYMBOLS
    first = torch.where((place == 0) & ~image, other, symbol)
    assert torch.equal(reader.losses(first, patch, image)["text"], text)
    last = torch.where((place == mixture_of_mamba.STRETCH - 1) & ~image, other, symbol)
    assert not torch.equal(reader.losses(last, patch, image)["text"], text)
    assert reader.active() < sum(p.numel() for p in reader.parameters())


def test_a_tenth_of_the_experts_is_switched_off():
    excess = torch.randn(32, 32)
    mask = monet.kept(excess)
    assert int((~mask).sum()) == 102
    assert excess[~mask].min() > excess[mask].max()


def about(mean, spread=0.01):
    return {"low": mean - spread, "mean": mean, "high": mean + spread}


RULES = {
    monet: (
        {
            "monet - dense": about(0.015),
            "chosen - random": about(0.1),
            "switched_off": {"chosen, own": about(0.3), "chosen, others": about(0.1)},
        },
        [
            (["monet - dense"], about(0.03)),
            (["chosen - random"], about(0.0)),
            (["switched_off", "chosen, others"], about(0.2)),
        ],
    ),
    moduleformer: (
        {
            "load - information, entropy": about(0.1),
            "max_violation": {"information": about(1.0), "load": about(0.9)},
            "plain - concentrated, half": about(0.1),
        },
        [
            (["load - information, entropy"], about(0.0)),
            (["max_violation", "information"], about(1.2)),
            (["plain - concentrated, half"], about(-0.1)),
        ],
    ),
}


@pytest.mark.parametrize("module", RULES)
def test_each_condition_of_a_rule_can_fail(module):
    right, wrong = RULES[module]
    assert module.holds(right)
    for where, value in wrong:
        assert not module.holds(changed(right, where, value)), where


def test_knowledge_of_a_domain_is_looked_for_and_put_back(monkeypatch):
    monkeypatch.setattr(monet, "ROWS", 2)
    model = contestant("monet", hidden_size=16, num_hidden_layers=2).build().eval()
    found = monet.knowledge(model, 1)
    assert found["chosen, selectivity"] == pytest.approx(found["chosen, own"] - found["chosen, others"])
    assert found["chosen, own"] != found["random, own"]
    assert all(layer.mlp.mask is None for layer in model.model.layers)


def test_half_of_the_experts_are_left_after_tuning(monkeypatch):
    monkeypatch.setattr(moduleformer, "STEPS", 2)
    recipe = contestant("moduleformer", hidden_size=16, num_hidden_layers=2, balance={"concentration": 0})
    model = recipe.build().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = moduleformer.spared(recipe, model, 1)
    assert found["plain, half"] != found["concentrated, half"]  # the term is at work
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moduleformer.halve(model, 1)
    assert [int(layer.mlp.gate.pool.sum()) for layer in model.model.layers] == [8, 8]


def test_a_share_that_is_the_same_in_both_tasks_falsifies():
    good = {"low": 0.99}
    rule = {"mixed - feed-forward": good, "mixed - recurrent": good, "order to gru - bag to gru": good}
    assert hecto.holds({"gru_share": {"order": good}, "rule": rule})
    same = rule | {"order to gru - bag to gru": {"low": -0.1}}
    assert not hecto.holds({"gru_share": {"order": good}, "rule": same})
