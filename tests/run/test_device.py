"""Experts computed on another device than the one they are read to; here the CPU stands for that device."""

import importlib

import miniatures
import pytest
import torch

import families
from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError, CheckpointError, OptionError, UnsupportedModelError
from moekit.run import answer, load, paging
from moekit.run._device import SPARE
from moekit.stream import LoadedModel


@pytest.fixture
def device(monkeypatch):
    """A "cuda" that is the CPU; what is asked of the driver is noted."""
    asked = {"fraction": None, "free": 10**10, "held": 0}
    opening = importlib.import_module("moekit.run.paging")
    monkeypatch.setattr(opening, "pick_device", lambda name: torch.device("cpu:0" if name == "cuda" else name))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (asked["free"], 10**10))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: asked["held"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: asked["held"])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: asked.update(fraction=share))
    return asked


@pytest.fixture
def opened(device):
    models = []

    def make(*args, **options):
        models.append(load(*args, device="cuda", **options))
        return models[-1]

    yield make
    for model in models:
        paging(model).close()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_outputs_are_the_models_whatever_fits_on_the_device_and_in_memory(family, opened, tmp_path):
    model, inputs = families.build(family)
    model.save_pretrained(tmp_path)
    paged = opened(tmp_path)
    served = paging(paged)
    everything = logits(paged, inputs)
    torch.testing.assert_close(everything, logits(LoadedModel.load(Checkpoint.open(tmp_path)).model, inputs))
    for store in (served.store, served.below):
        store.resize(max(layer.unit for layer in store.layers))
        assert torch.equal(logits(paged, inputs), everything)
        assert len(store.resident()) == 1
    assert served.store.counters.demand_bytes > 0
    assert served.below.counters.demand_bytes > 0


def test_what_is_warm_in_memory_is_not_read_again(opened):
    model = opened("moekit:mini")
    served, ids = paging(model), torch.randint(32, 120, (1, 30), generator=torch.Generator().manual_seed(2))
    first, _ = answer(model, ids, 8)
    served.store.clear(served.store.policy)
    again, cost = answer(model, ids, 8)
    assert torch.equal(again, first)
    assert cost.counters.demand_bytes > 0
    assert cost.disk.demand_bytes + cost.disk.prefetch_bytes == 0


@pytest.mark.parametrize("ahead", [0, 3])
def test_reading_ahead_reaches_the_device(opened, ahead):
    model = opened("moekit:mini", policy="lru", ahead=ahead)
    served = paging(model)
    served.store.resize(served.expert_bytes // 4)
    served.below.resize(served.expert_bytes // 2)
    made, cost = answer(model, torch.arange(40, 60)[None], 6)
    assert len(made) == 6
    assert (cost.counters.prefetch_bytes > 0) == (ahead > 0)


def test_a_disk_that_fails_is_told_by_the_one_who_waits(opened, monkeypatch):
    model = opened("moekit:mini")
    served = paging(model)

    def fail(expert):
        raise CheckpointError("the disk is gone")

    for tier in served.below.layers:
        monkeypatch.setattr(tier, "fill", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        answer(model, torch.arange(40, 60)[None], 2)
    monkeypatch.undo()
    assert len(answer(model, torch.arange(40, 60)[None], 2)[0]) == 2


def test_a_cap_on_the_device_is_kept_and_told_to_its_allocator(opened, device):
    free = paging(opened("moekit:mini"))
    assert (free.store.budget, device["fraction"]) == (free.expert_bytes, None)
    device["held"] = 5 * 10**6
    served = paging(opened("moekit:mini", device_memory="30MB", context=64))
    assert device["fraction"] == pytest.approx(0.003)
    assert 0 < served.store.budget < 25 * 10**6


def test_a_device_without_room_is_refused(device):
    device["free"] = SPARE + 1000
    with pytest.raises(BudgetError, match=r"cpu:0 has 0 MB left, but a context takes .* --device-memory"):
        load("moekit:mini", device="cuda")


def test_packed_experts_stay_on_the_cpu(opened, tmp_path):
    miniatures.write("moekit", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="packed experts are computed on the CPU: run this model without"):
        opened(tmp_path / "model")


def test_stand_ins_stay_on_the_cpu(opened):
    with pytest.raises(OptionError, match="stand-ins are packed, and packed experts are computed on the CPU"):
        opened("moekit:mini", stand_in="moekit:mini", read=lambda index, weight: index)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_says_so():
    with pytest.raises(OptionError, match="device cuda was asked for, but this machine"):
        load("moekit:mini", device="cuda")
