"""Losses measured layer by layer from disk: as in memory, within the cap, or refused with the cap that works."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from applying import alias, keep, merge, mixed, plan_of

import families
from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError
from moekit.plan import LiveLoss, Plan, live_loss
from moekit.plan.live_streamed import StreamedLoss
from moekit.stream import LoadedModel, StreamedModel, memory

SEQUENCES = [np.random.default_rng(i).integers(3, 60, 24) for i in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(miniatures.plain(tmp_path_factory.mktemp("streamed") / "source"))


@pytest.fixture(scope="module")
def both(source: Checkpoint) -> tuple[LiveLoss, StreamedLoss]:
    loaded = LiveLoss(LoadedModel.load(source, dtype=torch.float32), source, SEQUENCES)
    return loaded, StreamedLoss(StreamedModel(source, dtype=torch.float32), source, SEQUENCES)


@pytest.mark.parametrize("make", [keep, merge, alias, mixed])
def test_the_same_loss_as_in_memory(make, source: Checkpoint, both) -> None:
    loaded, streamed = both
    plan = plan_of(source, make)
    expected = loaded(plan)
    assert expected > 1e-4
    assert streamed(plan) == pytest.approx(expected, rel=1e-4)
    assert streamed.num_tokens == loaded.num_tokens


def test_the_source_loses_nothing_before_and_after(source: Checkpoint, both) -> None:
    streamed = both[1]
    same = Plan(source=source.fingerprint, layers={})
    assert streamed(same) == 0
    assert streamed(plan_of(source, keep)) > 0
    assert streamed(same) == 0
    streamed.restore()
    assert all(parameter.is_meta for parameter in streamed._runner.model.parameters())


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx", "jamba"])
def test_layouts_that_give_copies_are_written_back(family: str, tmp_path: Path) -> None:
    """Interleaved, flattened and mixed layouts."""
    model, inputs = families.build(family)
    model.save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    ids = [np.asarray(row) for row in inputs["input_ids"]]
    loaded = LiveLoss(LoadedModel.load(source, dtype=torch.float32), source, ids)
    streamed = StreamedLoss(StreamedModel(source, dtype=torch.float32), source, ids)
    plan = plan_of(source, mixed)
    assert streamed(plan) == pytest.approx(loaded(plan), rel=1e-4)


def test_a_cap_too_small_names_one_that_works(source: Checkpoint) -> None:
    memory.cap(1)  # tensors of their own pages from here on, as under any cap
    tight = memory.rss() + 1_000_000  # the peak may be far above, left by tests before this one
    with pytest.raises(BudgetError, match=r"the smallest cap that works is \d+MB") as error:
        live_loss(source, {"a": SEQUENCES}, max_ram=tight)
    smallest = int(re.search(r"works is (\d+)MB", str(error.value))[1]) * 10**6
    found = live_loss(source, {"a": SEQUENCES}, max_ram=smallest + 200_000_000)
    assert found is not None
    assert found(plan_of(source, keep)) > 0
    assert memory.peak_rss() <= smallest + 200_000_000


def test_the_reference_is_thinned_to_what_the_cap_leaves(source: Checkpoint, both, monkeypatch) -> None:
    monkeypatch.setattr("moekit.plan.live_streamed.KEPT_LOGITS", 20 * source.transformers_config.vocab_size)
    thin = StreamedLoss(StreamedModel(source, dtype=torch.float32), source, SEQUENCES)
    assert 10 <= thin.num_tokens <= 24 < both[1].num_tokens
    assert thin(plan_of(source, keep)) == pytest.approx(both[1](plan_of(source, keep)), rel=1.0)
    assert thin(Plan(source=source.fingerprint, layers={})) == 0


def test_packed_experts_and_no_text_leave_nothing_to_measure(source: Checkpoint, tmp_path: Path) -> None:
    packed = Checkpoint.open(miniatures.write("moekit", tmp_path / "packed"))
    assert live_loss(packed, {"a": SEQUENCES}) is None
    assert live_loss(source, {"a": []}) is None


def test_progress_is_told_of_layers(source: Checkpoint, both) -> None:
    told: list[tuple[int, int]] = []
    both[1].progress = lambda done, total: told.append((done, total))
    both[1](plan_of(source, keep))
    both[1].progress = None
    assert told[-1][0] == told[-1][1] > 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)
