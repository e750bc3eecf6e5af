"""OuterSync between three real processes: what the papers' equations give, the bytes they say, and what goes wrong."""

import pytest
import torch
from outer_by_hand import SCHEDULES, STEPS, WORLD, network
from outer_processes import found_by
from outer_work import work
from torch import nn

from moekit.errors import OptionError
from moekit.parallel._codec import codec
from moekit.parallel._errors import ParallelError
from moekit.parallel._outer_fragments import Averaged, OuterStep, by_layers
from moekit.parallel._outer_link import Link, SlowLink
from moekit.parallel.outer import OuterSync


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the workers saw; the last one is killed at the end."""
    return found_by(work, WORLD, tmp_path_factory.mktemp("outer"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_the_one_written_down_by_hand(found, name):
    for worker in found:
        assert worker["schedules"][name]["off"] < 2e-6
        assert worker["schedules"][name]["same"]


def test_a_mean_after_every_step_is_the_step_of_one_process(found):
    assert max(worker["one step"] for worker in found) < 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_bytes_are_those_of_the_formula(found, name):
    options = SCHEDULES[name]
    for worker in found:
        ran, traffic = worker["schedules"][name], worker["schedules"][name]["traffic"]
        parts, every = options.get("parts", 1), options["every"]
        starts = [[t for t in range(1, STEPS + 1) if (t - i * every // parts) % every == 0] for i in range(parts)]
        times = [len(s) + (s[-1] < STEPS) for s in starts]
        per_number = {"float32": 4, "bfloat16": 2}.get(options.get("code", "float32"))
        for size, count in ran["sizes"]:
            assert size == (per_number * count if per_number else -(-count // 2) + 4 * -(-count // 128))
        assert traffic["exchanges"] == sum(times)
        assert traffic["uploaded"] == sum(n * size for n, (size, _) in zip(times, ran["sizes"], strict=True))
        assert traffic["largest"] == max(size for size, _ in ran["sizes"])
        in_ring = 2 * (WORLD - 1) / WORLD if options.get("code", "float32") == "float32" else WORLD - 1
        assert traffic["carried"] == pytest.approx(in_ring * traffic["uploaded"], abs=traffic["exchanges"])


def test_fragments_lower_the_peak_and_four_bits_the_sum(found):
    traffic = {name: ran["traffic"] for name, ran in found[0]["schedules"].items()}
    assert traffic["fragments"]["largest"] < 0.6 * traffic["diloco"]["largest"]
    assert traffic["four bits"]["uploaded"] < traffic["overlap"]["uploaded"] / 5


def test_a_resumed_run_is_the_same_bits(found):
    for worker in found:
        assert worker["resumed"]["flying"] == 2
        assert worker["resumed"]["same"]
        assert worker["resumed"]["files"] == ["outer-00000009.safetensors", "outer-00000010.safetensors"]


def test_training_goes_on_while_an_exchange_is_in_flight(found):
    """Were the exchange waited for where it begins, both would wait for each other until their time is up."""
    assert all(worker["in flight"] for worker in found)


def test_owned_rows_are_copied_and_never_averaged(found):
    for rank, worker in enumerate(found):
        start = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        grown = [v + (i // 2 + 1) * 2 for i, v in enumerate(start)]
        alone = [v + (rank + 1) * (i // 2 == rank) for i, v in enumerate(start)]
        later = [v + (rank + 1) * (i // 2 == rank) for i, v in enumerate(grown)]
        assert worker["owned"]["seen"] == [alone, grown, later]
        assert worker["owned"]["end"] == [v + (i // 2 + 1) for i, v in enumerate(grown)]
        assert worker["owned"]["traffic"]["uploaded"] == 2 * 8


def test_the_first_weights_are_those_of_the_first_worker(found):
    assert [worker["sharing"] for worker in found] == [{"sum": 0.0, "bytes": 28}] * WORLD


def test_an_emulated_link_holds_back_what_came(found):
    for worker in found:
        assert worker["emulated"]["needed"] == pytest.approx(0.01 + (WORLD - 1) * 500 / 1e5)
        assert worker["emulated"]["stalled"] >= worker["emulated"]["needed"] * 0.9


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("schedule", "ParallelError: workers differ in schedule or fragments: start all from the same"),
        ("weights", "ParallelError: workers differ in common weights: start all from the same model"),
        ("no folder", "OptionError: training goes on after step 5, but no folder was given: resume both"),
        ("other step", "is after 10: resume both or start both anew"),
        ("other run", "outer-00000010.safetensors holds a run with another schedule or other fragments"),
        ("step", "ParallelError: workers differ in steps done (9, 10, 10): start all from"),
        ("timeout", "OptionError: timeout=0 is a number of seconds above 0"),
        ("nccl", "OptionError: fragments travel from the CPU, while the GPU trains on, and NCCL cannot carry them"),
        ("skipped", "OptionError: the loop did 2 steps, this state is after 1: call it after every step"),
        ("not finite", "that are not finite at step 4: lower its learning rate"),
    ],
)
def test_one_line_says_what_is_wrong(found, what, line):
    for worker in found:
        assert line in worker["mistakes"][what]


def test_a_lost_worker_is_one_line_within_the_bound(found):
    for rank in (0, 1):
        alone = found[rank]["alone"]
        assert f"ParallelError: worker {rank} of 3: the exchange 'fragment 0' failed after 1." in alone["late"]
        assert alone["late took"] < 10
        assert f"ParallelError: worker {rank} of 3: the exchange 'fragment 1' failed" in alone["killed"]
        assert "start all of them again from their folders" in alone["killed"]
        assert alone["killed took"] < 25
        assert alone["afterwards"].startswith("ParallelError")
    assert "alone" not in found[2]


def test_layers_are_dealt_in_strides():
    net = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(5)), "head": nn.Linear(2, 2)})
    names = [
        sorted({name.rpartition(".")[0] for name in group}) for group in by_layers(dict(net.named_parameters()), 2)
    ]
    assert names == [["layers.0", "layers.3"], ["layers.1", "layers.4"], ["head", "layers.2"]]


def test_mistakes_that_need_no_second_worker():
    with pytest.raises(ParallelError, match="workers are not connected: call"):
        Link()
    with pytest.raises(OptionError, match="bandwidth=0 must be above 0"):
        SlowLink(bandwidth=0.0)
    for bad in ({"learning_rate": 0.0}, {"momentum": 1.0}, {"mix": 1.0}):
        with pytest.raises(OptionError, match=r"must be above 0, momentum=\S+ and mix=\S+ in \[0, 1\)"):
            OuterStep(**bad)
    with pytest.raises(OptionError, match="0 layers per fragment of a model with 2 numbered layers"):
        by_layers(dict(network().named_parameters()), 0)
    fragment = Averaged("all", [nn.Parameter(torch.zeros(2))], OuterStep(), codec("float32"), offset=5)
    with pytest.raises(OptionError, match="every=4 steps with delay=4: the delay must be from 0 to 3"):
        OuterSync([fragment], None, every=4, delay=4)
    for fragments in ([], [fragment]):
        with pytest.raises(OptionError, match="give at least one, all from 0 to 3"):
            OuterSync(fragments, None, every=4)
