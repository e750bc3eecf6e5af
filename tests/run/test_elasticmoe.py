"""ElasticMoE: devices come and go while requests are answered; the fewest experts move, and memory stays theirs."""

import os
import threading
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.bank import Activation
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import OptionError, UnsupportedModelError
from moekit.formats import DenseBank
from moekit.kernels import fused
from moekit.run import _scaling_service, _virtual
from moekit.run._scaling import even, fewest_moves, rescaled
from moekit.run._scaling_device import Device
from moekit.run._scaling_owner import Owner, stacked
from moekit.run._scaling_wire import Channel, ScalingError, pair
from moekit.run.elasticmoe import ElasticMoE
from moekit.run.expertweave import ExpertWeave
from moekit.stream import LoadedModel

EXPERTS, LAYERS, EXPERT_BYTES = 16, 8, 4 * 3 * 192 * 64

# -- the planner


@settings(max_examples=60)
@given(device=st.lists(st.integers(0, 3), min_size=4, max_size=7), count=st.integers(1, 4))
def test_the_fewest_experts_move(device, count):
    devices = list(range(1, 1 + count))  # device 0 always goes
    new = rescaled(np.array(device), devices)
    shares = np.bincount(new, minlength=5)[devices]
    assert shares.max() - shares.min() <= 1
    moved = int((new != device).sum())
    assert moved == fewest_moves([device.count(d) for d in devices], len(device), count)
    best = min(
        sum(a != b for a, b in zip(device, other, strict=True))
        for other in product(devices, repeat=len(device))
        if max(sizes := [other.count(d) for d in devices]) - min(sizes) <= 1
    )
    assert moved == best


def test_round_shares_move_the_share_of_the_newcomers():
    before = even(60, range(2))
    for devices in (3, 4, 6):
        assert fewest_moves([30, 30], 60, devices) == 60 * (devices - 2) // devices
        assert int((rescaled(before, range(devices)) != before).sum()) == 60 * (devices - 2) // devices
    # numbering all experts anew would move nearly all of them
    assert int((even(60, range(4)) != even(60, range(3))).sum()) == 30 > fewest_moves([20] * 3, 60, 4) == 15


@pytest.mark.parametrize("devices", [[], [1, 1], list(range(5))])
def test_devices_that_cannot_be(devices):
    with pytest.raises(OptionError, match=r"for 4 experts: expected different ones, 1 to 4"):
        rescaled(np.zeros(4, int), devices)
    with pytest.raises(OptionError, match="for 4 experts"):
        even(4, devices)


def test_no_devices():
    with pytest.raises(OptionError, match="0 devices: expected 1 or more"):
        ElasticMoE(devices=0)


# -- messages


def test_messages_carry_bytes_and_files(tmp_path):
    ours, theirs = pair("there")
    other = Channel(theirs)
    with (tmp_path / "x").open("w+b") as file:
        file.write(b"inside")
        file.flush()
        ours.send({"a": [1]}, np.arange(3), b"end", fds=[file.fileno()])
        head, data, (fd,) = other.receive()
    assert head == {"a": [1]}
    assert bytes(data) == np.arange(3).tobytes() + b"end"
    assert os.pread(fd, 6, 0) == b"inside"
    os.close(fd)
    other.send({"error": "broken"})
    with pytest.raises(ScalingError, match="there failed: broken"):
        ours.answer()
    other.close()
    with pytest.raises(ScalingError, match="lost there: it has ended; open the service anew"):
        ours.receive()
    with pytest.raises(ScalingError, match=r"lost there: .*Broken pipe"):
        ours.send({})
    ours.close()


def test_a_silent_process_is_taken_for_dead():
    ours, theirs = pair("there", seconds=0.01)
    with pytest.raises(ScalingError, match="lost there: it did not answer in time"):
        ours.receive()
    ours.close()
    theirs.close()


# -- owner and device, in this process


def test_memory_that_runs_out_leaves_the_owner_as_it_was(monkeypatch):
    owner, device = Owner(), Device()
    owner.load({"checkpoint": "moekit:mini", "dtype": "bfloat16", "device": [[0] * 8 + [1] * 8] * LAYERS})
    before, now = owner.held({})["now"], [list(layer) for layer in owner.now]
    assert before["all"] == LAYERS * EXPERTS * EXPERT_BYTES // 2
    allocate, calls = _virtual.os.posix_fallocate, []

    def sometimes(*args):
        calls.append(args)
        if len(calls) > 3:
            raise OSError(12, "Cannot allocate memory")
        allocate(*args)

    order = {"do": "move", "device": [[0] * 5 + [2] * 6 + [1] * 5] * LAYERS, "all": False}
    with monkeypatch.context() as patch:
        patch.setattr(_virtual.os, "posix_fallocate", sometimes)
        with pytest.raises(Exception, match="Cannot allocate memory"):
            owner.move(order)
    assert owner.held({})["now"] == {**before, "2": 0}
    assert owner.now == now
    # carried through later, or begun twice: nothing leaks
    assert owner.move(order)["experts"] == owner.move(order)["experts"] == LAYERS * 6
    table = owner.table({"of": 2})
    device.attach({"epoch": 1, "shapes": owner.shapes, **table}, owner.frames[2].fd)
    owner.settle({})
    assert owner.held({})["now"]["all"] == before["all"]
    bank, own = device.epochs[1][4], blocks(LoadedModel.load(Checkpoint.open("moekit:mini")).model)[4].bank()
    assert torch.equal(bank.gate_up, own.gate_up[5:11])
    assert torch.equal(bank.down, own.down[5:11])
    assert bank.gate_up.untyped_storage().data_ptr() != own.gate_up.untyped_storage().data_ptr()
    owner.clear({})
    assert owner.held({})["now"]["all"] == 0


def test_other_experts_are_refused():
    gated = DenseBank(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
    relu = Activation("relu", torch.relu, gated=False)
    plain = DenseBank(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), activation=relu)
    assert list(stacked(gated, "Experts")) == ["gate_up", "down"]
    with pytest.raises(UnsupportedModelError, match="Experts: only dense experts with a gated SiLU"):
        stacked(plain, "Experts")


def test_experts_that_cannot_be_mapped(monkeypatch):
    monkeypatch.setattr(_scaling_service, "is_decorated", lambda module: False)
    with pytest.raises(UnsupportedModelError, match="in a way that other processes cannot map"):
        ElasticMoE().open("moekit:mini")


# -- the service


def same(ours, expected):
    if fused.lacking() is None:
        return torch.equal(ours, expected)
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def service():
    opened = ElasticMoE(devices=2).open("moekit:mini")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def prompts():
    """Token ids and what one process answers."""
    model = LoadedModel.load(Checkpoint.open("moekit:mini"), dtype=torch.float32).model
    ExpertWeave(adapters=1, most=1).open(model)
    draw = torch.Generator().manual_seed(5)
    ids = [torch.randint(32, 120, (1, length), generator=draw) for length in (3, 17, 40)]
    with torch.no_grad():
        return [(one, model(one).logits) for one in ids]


class Client(threading.Thread):
    """Asks one prompt after the other until it is told to stop, and keeps the answers."""

    def __init__(self, service, prompts):
        super().__init__(daemon=True)
        self.service, self.prompts, self.stop = service, prompts, threading.Event()
        self.answers, self.errors = [], []

    def run(self):
        while not self.stop.is_set() or len(self.answers) < len(self.prompts):
            ids, expected = self.prompts[len(self.answers) % len(self.prompts)]
            try:
                self.answers.append(same(self.service.ask(ids), expected))
            except Exception as error:
                self.errors.append(error)
                return

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join(200)


def test_requests_are_answered_while_devices_come_and_go(service, prompts):
    with Client(service, prompts) as client:
        for devices in ([0, 1, 2], [1, 2], [0, 1, 2], [0, 1]):
            old, asked = service.epoch, len(client.answers)
            found = service.scale(devices)
            least = LAYERS * fewest_moves([int((old.device[0] == d).sum()) for d in devices], EXPERTS, len(devices))
            assert (found.moved_experts, found.moved_bytes) == (least, least * EXPERT_BYTES)
            before, after = found.frames
            stayed = torch.nonzero(service.epoch.device == old.device).tolist()
            assert len(stayed) == LAYERS * EXPERTS - least
            assert all(before[layer, expert] == after[layer, expert] for layer, expert in stayed)
            assert sum(before[key] != after[key] for key in before) == least
            assert found.held["all"] == service.expert_bytes == LAYERS * EXPERTS * EXPERT_BYTES
            assert found.peak["all"] == service.expert_bytes + found.moved_bytes
            assert found.closed_seconds == 0
            assert len(client.answers) >= asked
    assert client.errors == []
    assert len(client.answers) >= len(prompts)
    assert all(client.answers)


def test_the_baselines_answer_too_but_stop_or_hold_everything_twice(service, prompts):
    with Client(service, prompts) as client:
        copied = service.scale([0, 1, 2], how="copy")
        assert copied.moved_bytes == service.expert_bytes
        assert copied.peak["all"] == 2 * service.expert_bytes
        cold = service.scale([0, 1], how="cold")
        assert cold.closed_seconds > 0
        assert cold.peak["all"] == service.expert_bytes
    assert client.errors == []
    assert all(client.answers)


def test_a_request_in_flight_ends_where_it_began(service, prompts, monkeypatch):
    """The old devices are unmapped only once it is done."""
    entered, go = threading.Event(), threading.Event()
    layer, retired = service.layer, []

    def slow(number, *args):
        if number == 3 and not go.is_set():
            entered.set()
            assert go.wait(60)
        return layer(number, *args)

    monkeypatch.setattr(service, "layer", slow)
    retire = service._retire
    monkeypatch.setattr(service, "_retire", lambda old: (go.set(), retire(old), retired.append(old.running)))
    with Client(service, prompts[:1]) as client:
        assert entered.wait(60)
        service.scale([0, 1, 2])
    assert retired == [0]
    assert client.errors == []
    assert all(client.answers)
    service.scale([0, 1])


def test_errors_leave_the_service_at_work(service, prompts, monkeypatch):
    ids, expected = prompts[0]
    with pytest.raises(OptionError, match=r"devices \[\] for 16 experts"):
        service.scale([])
    with pytest.raises(OptionError, match="ask the service, not the model"), torch.no_grad():
        service.model(ids)
    with pytest.raises(ScalingError, match="the owner of the experts failed: AttributeError"):
        service.crew.owner.ask({"do": "nonsense"})
    with pytest.raises(ScalingError, match="device 1 failed: KeyError"):
        service.crew.tell(1, {"do": "release", "epoch": 99})
    row = [np.zeros(1, np.int64), np.zeros(192, np.float32)]
    with pytest.raises(ScalingError, match="device 0 failed: KeyError"):
        service.crew.compute({d: ({"do": "run", "epoch": 99, "rows": 1, "dtype": "float32"}, row) for d in (0, 1)})
    with monkeypatch.context() as patch:
        patch.setattr(_scaling_service, "SECONDS", 0.01)
        patch.setattr(service, "_open", False)
        with pytest.raises(ScalingError, match="closed for a restart"):
            service.ask(ids)
        service.epoch.running += 1
        with pytest.raises(ScalingError, match="1 requests under the old devices did not end"):
            service._retire(service.epoch)
        service.epoch.running -= 1
    assert same(service.ask(ids), expected)


def test_a_lost_device_is_an_error_and_no_wait(service, prompts):
    """The last test: the service is gone afterwards."""
    service.crew.devices[1].close()
    with pytest.raises(ScalingError, match="lost device 1"):
        service.ask(prompts[1][0])
    service.close()
    assert service.crew._process.returncode == 0
    service.close()
