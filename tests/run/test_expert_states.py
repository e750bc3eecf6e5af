"""Experts trained from a file: the parameters of an optimizer that holds them all, whatever fits, whoever is used."""

import json

import pytest
import torch

import families
from moekit.errors import BudgetError, CheckpointError, OptionError, OutputError, UnsupportedModelError
from moekit.run._expert_states import Adam, ExpertStates
from moekit.run._expert_training import train_on_disk

EXPERTS, SHAPES = 6, [torch.Size([8, 12]), torch.Size([12, 5])]
ADAM = Adam(rate=0.02, weight_decay=0.1)


def fresh(folder, most, adam=ADAM, evict="decayed-lfu"):
    return ExpertStates(folder, {(0, e): SHAPES for e in range(EXPERTS)}, most, adam, evict)


def start():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(EXPERTS, *shape, generator=draw) for shape in SHAPES]


def gradients(steps):
    """For each step, by expert, its gradients: two or three experts of six are used."""
    draw = torch.Generator().manual_seed(2)
    return [
        {
            e: [torch.randn(shape, generator=draw) for shape in SHAPES]
            for e in torch.randperm(EXPERTS, generator=draw)[: 2 + step % 2].tolist()
        }
        for step in range(steps)
    ]


def in_memory(steps, rates):
    stacked = [torch.nn.Parameter(tensor) for tensor in start()]
    optimizer = torch.optim.AdamW(stacked, lr=rates[0], weight_decay=ADAM.weight_decay)
    for grads, rate in zip(gradients(steps), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for at, parameter in enumerate(stacked):
            parameter.grad = torch.zeros_like(parameter)
            for expert, own in grads.items():
                parameter.grad[expert] = own[at]
        optimizer.step()
    return [parameter.data for parameter in stacked]


def step(states, grads, following):
    states.routed(0, sorted(grads))
    for expert, own in grads.items():
        states.update((0, expert), own)
        assert len(states._there) <= states.most
    states.advance(following)


def stored(states):
    return [torch.stack([states.weights((0, e))[at].clone() for e in range(EXPERTS)]) for at in range(len(SHAPES))]


RATES = [0.02, 0.02, 0.01, 0.03, 0.005, 0.02, 0.02]


@pytest.mark.parametrize("most", [1, 2, EXPERTS])
@pytest.mark.parametrize("evict", ["decayed-lfu", "lru:pool=global"])
def test_bits_are_those_of_the_optimizer_in_memory(tmp_path, most, evict):
    states = fresh(tmp_path, most, evict=evict)
    for expert in range(EXPERTS):
        states.put((0, expert), [tensor[expert] for tensor in start()])
    for grads, following in zip(gradients(7), [*RATES[1:], None], strict=True):
        step(states, grads, following)
    for got, expected in zip(stored(states), in_memory(7, RATES), strict=True):
        assert torch.equal(got, expected)
    states.close()


def test_what_is_taken_up_goes_on_with_the_same_bits(tmp_path):
    states = fresh(tmp_path, 2)
    for expert in range(EXPERTS):
        states.put((0, expert), [tensor[expert] for tensor in start()])
    for grads, following in zip(gradients(7)[:4], RATES[1:5], strict=True):
        step(states, grads, following)
    states.close()
    again = fresh(tmp_path, 3)
    for grads, following in zip(gradients(7)[4:], [*RATES[5:], None], strict=True):
        step(again, grads, following)
    assert all(torch.equal(a, b) for a, b in zip(stored(again), in_memory(7, RATES), strict=True))


def test_bytes_are_counted_both_ways(tmp_path):
    states = fresh(tmp_path, 1)
    for expert in range(EXPERTS):
        states.put((0, expert), [tensor[expert] for tensor in start()])
    one = states.nbytes // EXPERTS
    assert one == 3 * 4 * (8 * 12 + 12 * 5)
    assert states.counters.written_bytes == states.nbytes
    step(states, {0: [torch.ones(s) for s in SHAPES], 1: [torch.ones(s) for s in SHAPES]}, None)
    assert states.counters.read_bytes == 2 * one
    assert states.counters.written_bytes == states.nbytes + one  # the second is still in memory
    states.weights((0, 1))
    assert states.counters.hits == 1
    states.flush()
    assert states.counters.written_bytes == states.nbytes + 2 * one


def test_an_expert_is_updated_once_in_a_step(tmp_path):
    states = fresh(tmp_path, 2)
    states.update((0, 0), [torch.ones(s) for s in SHAPES])
    with pytest.raises(OptionError, match="expert 0 of layer 0 was already updated in this step: advance first"):
        states.update((0, 0), [torch.ones(s) for s in SHAPES])


def test_what_cannot_be_taken_up(tmp_path):
    states = fresh(tmp_path, 2)
    states.flush()
    states.put((0, 0), [torch.ones(s) for s in SHAPES])  # and then the process ends
    with pytest.raises(CheckpointError, match="was left between two flushes"):
        fresh(tmp_path, 2)
    states.flush()
    with pytest.raises(CheckpointError, match="holds the states of other experts"):
        ExpertStates(tmp_path, {(0, 0): SHAPES}, 1)
    (tmp_path / "states.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"states.json is damaged"):
        fresh(tmp_path, 2)
    with pytest.raises(BudgetError, match="room for 0 experts' states"):
        fresh(tmp_path / "none", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        fresh(tmp_path / "file" / "under", 1)


def test_a_short_file_is_noticed(tmp_path):
    states = fresh(tmp_path, 1)
    (tmp_path / "states.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="ends too soon"):
        states.weights((0, 3))


# -- a whole model

IDS = torch.randint(5, 90, (3, 2, 10), generator=torch.Generator().manual_seed(3))
FAMILIES = ["qwen3_moe", "gpt_oss", "olmoe"]
DAMPED = Adam(rate=0.02, weight_decay=0.1, eps=1e-3)
"""Sums are taken in another order than in memory; Adam would blow up what is left of a gradient that is nearly zero."""


def model(family):
    built, _ = families.build(family)
    built.set_experts_implementation("moekit")
    return built.train()


def trained(built, on_disk=None):
    """After three steps: the loss of each, and all parameters."""
    optimizer = torch.optim.AdamW(
        [p for p in built.parameters() if p.requires_grad],
        lr=DAMPED.rate,
        weight_decay=DAMPED.weight_decay,
        eps=DAMPED.eps,
    )
    losses = []
    for ids in IDS:
        loss = built(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_disk is not None:
            on_disk.advance()
    if on_disk is not None:
        on_disk.settle()
    return losses, {name: parameter.detach().clone() for name, parameter in built.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_as_in_memory(tmp_path, family):
    expected, whole = trained(model(family))
    found = {}
    for most in (1, 10**6):
        built = model(family)
        on_disk = train_on_disk(built, tmp_path / str(most), most, DAMPED)
        assert all(parameter.device.type == "meta" for name, parameter in built.named_parameters() if is_expert(name))
        found[most] = trained(built, on_disk)
    assert found[1][0] == found[10**6][0]
    assert all(torch.equal(found[1][1][name], found[10**6][1][name]) for name in whole)
    assert found[1][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_in_memory(tmp_path, family):
    whole, built = model(family), model(family)
    on_disk = train_on_disk(built, tmp_path, 2, DAMPED)
    for one in (whole, built):
        one(input_ids=IDS[0], labels=IDS[0]).loss.backward()
    reference = dict(whole.named_parameters())
    for name, parameter in built.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    experts = [parameter for name, parameter in reference.items() if is_expert(name)]
    torch.optim.AdamW(experts, lr=DAMPED.rate, weight_decay=DAMPED.weight_decay, eps=DAMPED.eps).step()
    on_disk.advance()
    on_disk.settle()
    for name, parameter in built.named_parameters():
        if is_expert(name):
            torch.testing.assert_close(parameter, reference[name], rtol=1e-4, atol=1e-5, msg=name)


def is_expert(name):
    return ".experts." in name and "gate_up_proj" in name


def test_a_run_on_disk_is_taken_up(tmp_path):
    built = model("qwen3_moe")
    on_disk = train_on_disk(built, tmp_path, 3, ADAM)
    on_disk.advance()
    on_disk.states.close()
    again = train_on_disk(model("qwen3_moe"), tmp_path, 3)
    assert (again.states.now, again.states.adam) == (1, ADAM)
    assert json.loads((tmp_path / "states.json").read_text())["rates"] == [ADAM.rate]


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="in float32: load the model with that dtype"):
        train_on_disk(model("qwen3_moe").to(torch.bfloat16), tmp_path, 1)
