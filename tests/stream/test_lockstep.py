"""The scheduler alone, on a toy model: who runs when, and what happens when something goes wrong."""

import threading

import pytest
import torch
from torch import nn

from moekit.stream._lockstep import walk


class Layer(nn.Module):
    def __init__(self, log, number):
        super().__init__()
        self.log, self.number = log, number

    def forward(self, x):
        self.log.append(f"{x.tolist()}@{self.number}")
        return x + 10


class Toy(nn.Module):
    def __init__(self, log, skips=()):
        super().__init__()
        self.layers = nn.ModuleList(Layer(log, n) for n in range(3))
        self.skips = skips

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if (int(x) % 10, number) not in self.skips:
                x = layer(x)
        return x


class Recorder:
    def __init__(self, log):
        self.log = log

    def enter(self, stop):
        self.log.append(f"+{stop}")

    def leave(self, stop):
        self.log.append(f"-{stop}")


def run(model, log, count=3, **options):
    calls = [lambda i=i: model(torch.tensor(i)) for i in range(count)]
    return walk(model, list(model.layers), Recorder(log), calls, **options)


def test_every_batch_passes_a_layer_before_the_next_layer_comes():
    log = []
    results = [int(r) for r in run(Toy(log), log)]
    assert results == [30, 31, 32]
    assert log == [
        "+0", "0@0", "1@0", "2@0", "-0", "+1", "10@1", "11@1", "12@1", "-1",
        "+2", "20@2", "21@2", "22@2", "-2",
    ]  # fmt: skip


def test_a_result_leaves_before_the_next_batch_makes_its_own():
    log = []
    for result in run(Toy(log), log):
        log.append(f"out {int(result)}")
    assert log[-7:] == ["20@2", "out 30", "21@2", "out 31", "22@2", "out 32", "-2"]


def test_batches_that_skip_layers_still_meet_at_the_others():
    log = []
    results = [int(r) for r in run(Toy(log, skips={(1, 0), (1, 1)}), log)]
    assert results == [30, 11, 32]
    assert [entry for entry in log if entry.startswith("+")] == ["+0", "+1", "+2"]


def test_layers_and_running_batches_are_reported():
    seen, running, log = [], [], []
    list(run(Toy(log), log, on_layer=lambda done, total: seen.append((done, total)), on_run=running.append))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert running == [0, 1, 2] * 4


def test_an_error_in_one_batch_is_raised_here_and_ends_all_threads():
    log, before = [], threading.active_count()
    model = Toy(log)

    def fail(*_):
        if log[-1] == "10@1":
            raise ValueError("broken layer")

    model.layers[1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="broken layer"):
        list(run(model, log))
    assert threading.active_count() == before
    assert not model.layers[0]._forward_pre_hooks


def test_closing_early_ends_all_threads():
    log, before = [], threading.active_count()
    model = Toy(log)
    results = run(model, log)
    assert int(next(results)) == 30
    results.close()
    assert threading.active_count() == before
    assert not model.layers[0]._forward_pre_hooks


def test_no_batches_no_work():
    log = []
    assert list(run(Toy(log), log, count=0)) == []
    assert log == []


def test_gradients_are_off_and_threads_follow_the_caller():
    log, seen = [], []
    model = Toy(log)
    model.layers[0].register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.get_num_threads())))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        list(run(model, log, count=1))
    finally:
        torch.set_num_threads(before)
    assert seen == [(False, 1)]
