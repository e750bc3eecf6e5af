"""SPES and Streaming DiLoCo (spes, streaming_diloco) between two real processes, under the stock Trainer."""

import pytest
import torch
from outer_processes import found_by
from outer_rows import WORLD, work

from moekit.errors import OptionError
from moekit.parallel.spes import Spes, nudged
from moekit.parallel.streaming_diloco import StreamingDiLoCo


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by(work, WORLD, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("same", ["True", "False"])
def test_spes_at_every_step_is_the_masked_step_of_one_process(found, same):
    assert max(worker["masked"][same] for worker in found) < 1e-6


def test_spes_keeps_state_and_sends_bytes_of_shared_and_own_alone(found):
    for worker in found:
        memory = worker["memory"]
        part = memory["shared"] + memory["experts"] // WORLD
        assert memory["gradients"] == part
        assert memory["moments"] == 2 * part
        assert memory["uploaded"] == 4 * part
        assert memory["broadcast"] >= 4 * (memory["shared"] + memory["experts"])


@pytest.mark.parametrize("row", ["spes", "streaming"])
def test_all_workers_end_with_one_model_and_resume_bit_for_bit(found, row):
    for worker in found:
        assert worker["one model"][row]
        assert worker["resumed"][row] == {"same": True, "losses": 8}


def test_the_trainer_does_not_see_the_other_workers(found):
    for worker in found:
        assert worker["untouched"] == {"same": True, "one model": False}
        assert worker["told again"] == "2"


def test_one_line_where_experts_cannot_be_dealt(found):
    for worker in found:
        assert "has 5 experts for 2 workers: choose a number of workers above 1 that divides 5" in worker["uneven"]
        assert "peers=6 of 6 experts" in worker["peers"]
        assert worker["uneven"].startswith("OptionError")


def test_merging_nudges_all_at_once_towards_the_nearest():
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(5, 3, 4, generator=draw) for _ in range(3)]
    moved = nudged([w.clone() for w in weights], 2, 0.25)
    for e in range(5):
        others = [j for j in range(5) if j != e]
        likeness = [float(torch.cosine_similarity(weights[0][e].flatten(), weights[0][j].flatten(), 0)) for j in others]
        near = [j for _, j in sorted(zip(likeness, others, strict=True), reverse=True)[:2]]
        for before, after in zip(weights, moved, strict=True):
            expected = 0.75 * before[e] + 0.25 * (before[near[0]] + before[near[1]]) / 2
            assert torch.allclose(after[e], expected, atol=1e-6)


def test_the_strength_of_merging_falls_to_zero():
    row = Spes(every=2, merge=0.1, merge_every=4, merge_decay=10)
    assert [round(row.strength(t), 6) for t in (2, 3, 4, 8, 12)] == [0.0, 0.0, 0.06, 0.02, 0.0]


def test_mistakes():
    with pytest.raises(OptionError, match="merge_every=150 must be a multiple of every=100"):
        Spes(merge_every=150)
    for bad in ({"merge": 2.0}, {"merge_decay": 0}, {"peers": 0}):
        with pytest.raises(OptionError, match=r"merge=\S+ must be from 0 to 1, merge_decay=\d+ and peers=\d+ at least"):
            Spes(**bad)
    with pytest.raises(OptionError, match="learning_rate=-1 must be above 0"):
        StreamingDiLoCo(learning_rate=-1.0).attach(torch.nn.Linear(1, 1), None)
