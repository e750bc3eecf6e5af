"""Killed at any instant, apply resumes, reads only what is left, and ends in the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from applying import contents, merge, plan_of

from checkpoint import miniatures
from moekit.checkpoint import Checkpoint, shards
from moekit.errors import OutputError
from moekit.plan.apply import apply
from moekit.plan.document import Plan
from moekit.plan.receipt import Receipt
from moekit.plan.reload import reload_in_fresh_process

pytestmark = pytest.mark.usefixtures("quick_reload")

Work = Callable[[Path, Plan, Path, Connection], None]
LAYERS = 8
TEXT = ["held-out text that is long enough to predict something"]
RUN_FIELDS = {"wall_seconds", "peak_memory_bytes", "max_ram_bytes", "source_bytes_read", "resumed"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Plan, Path]:
    folder = tmp_path_factory.mktemp("resume")
    checkpoint = Checkpoint.open(miniatures.plain(folder / "source", num_hidden_layers=LAYERS))
    return checkpoint, plan_of(checkpoint, merge), folder


@pytest.fixture
def whole(case: tuple[Checkpoint, Plan, Path]) -> dict[str, bytes]:
    """An undisturbed run, made once."""
    checkpoint, plan, folder = case
    if not (folder / "whole" / "out").exists():
        apply(checkpoint, plan, folder / "whole" / "out", text=TEXT)
    return contents(folder / "whole" / "out")


def killed(work: Work, source: Path, plan: Plan, output: Path) -> None:
    """Run ``work`` in another process and SIGKILL it at the point where it says it stands.

    Processes are forked from a server that has imported everything and run nothing, so that they start at once and
    inherit no threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moekit.plan.apply", "transformers.models.qwen3_moe.modeling_qwen3_moe"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(source, plan, output, there))
    child.start()
    there.close()
    try:
        assert here.poll(300), "the work did not come to the point where it was to be killed"
        assert here.recv() == "here"
    finally:
        child.kill()
        child.join()


def stand(here: Connection) -> None:
    """Wait to be killed."""
    here.send("here")
    signal.pause()


def at_unit(number: int, source: Path, plan: Plan, output: Path, here: Connection) -> None:
    """Stands still right after that many units are journaled."""
    apply(
        source,
        plan,
        output,
        text=TEXT,
        progress=lambda what, done, _: stand(here) if (what, done) == ("writing", number) else None,
    )


def inside_shard(number: int, source: Path, plan: Plan, output: Path, here: Connection) -> None:
    """Stands still with half of that unit's tensors on the disk."""

    def half(path: Path, run: Any) -> Any:
        if path.name.startswith(f"unit-{number:05d}"):
            shards.write_shard(path, run[: len(run) // 2])
            stand(here)
        return shards.write_shard(path, run)

    sys.modules["moekit.checkpoint.writer"].write_shard = half  # type: ignore[attr-defined]
    apply(source, plan, output, text=TEXT)


def while_reloading(source: Path, plan: Plan, output: Path, here: Connection) -> None:
    """Stands still when all is written and sealed, before it is published."""
    sys.modules["moekit.plan.apply"].reload_in_fresh_process = lambda *_, **__: stand(here)  # type: ignore[attr-defined]
    apply(source, plan, output, text=TEXT)


POINTS = {
    "after the sixth layer": (partial(at_unit, 1 + 6), 1 + 6),
    "after the first unit": (partial(at_unit, 1), 1),
    "inside the fourth layer": (partial(inside_shard, 4), 4),
    "before publication": (while_reloading, 1 + LAYERS),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes(
    case: tuple[Checkpoint, Plan, Path], whole: dict[str, bytes], tmp_path: Path, point: str
) -> None:
    checkpoint, plan, _ = case
    work, finished = POINTS[point]
    killed(work, checkpoint.path, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = Checkpoint.open(checkpoint.path)
    receipt = apply(again, plan, tmp_path / "out", text=TEXT)
    assert receipt.run["resumed"] == ["rest", *(f"model.layers.{i}" for i in range(LAYERS))][:finished]
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    assert again.counted_bytes == receipt.run["source_bytes_read"]
    if finished >= 1 + 6:
        assert again.counted_bytes < 0.4 * size
    assert_same(contents(tmp_path / "out"), whole)
    assert not list(tmp_path.glob(".out*"))


def assert_same(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Every file byte for byte, the receipt but for its ``run`` section."""
    assert found.keys() == whole.keys()
    one, two = (json.loads(files["receipt.json"]) for files in (found, whole))
    assert one.pop("run").keys() == two.pop("run").keys() == RUN_FIELDS
    assert one == two
    different = [name for name in whole if name != "receipt.json" and found[name] != whole[name]]
    assert not different


def test_a_full_disk_keeps_what_is_finished(
    case: tuple[Checkpoint, Plan, Path], whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan, _ = case

    def full(path: Path, run: Any) -> Any:
        if path.name.startswith("unit-00003"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return shards.write_shard(path, run)

    with monkeypatch.context() as patch:
        patch.setattr("moekit.checkpoint.writer.write_shard", full)
        with pytest.raises(
            OutputError, match=r"No space left on device; 3 finished units are kept, repeat the command"
        ):
            apply(checkpoint, plan, tmp_path / "out", text=TEXT)
    assert len(apply(checkpoint, plan, tmp_path / "out", text=TEXT).run["resumed"]) == 3
    assert_same(contents(tmp_path / "out"), whole)


def test_a_full_disk_while_the_source_is_recorded(
    case: tuple[Checkpoint, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan, _ = case

    def full(path: Path, run: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moekit.plan.held_out.write_shard", full)
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device"):
        apply(checkpoint, plan, tmp_path / "out", text=TEXT)
    assert not list(tmp_path.iterdir())


def test_the_output_is_the_same_with_and_without_a_cap(
    case: tuple[Checkpoint, Plan, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    checkpoint, plan, _ = case
    apply(checkpoint, plan, tmp_path / "out", text=TEXT, max_ram="60GB")
    assert_same(contents(tmp_path / "out"), whole)


def test_an_existing_output_is_kept_unless_told(case: tuple[Checkpoint, Plan, Path], tmp_path: Path) -> None:
    checkpoint, plan, _ = case
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(OutputError, match=r"out exists; pass --overwrite to replace it, or choose another output"):
        apply(checkpoint, plan, tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": b"mine"}
    apply(checkpoint, plan, tmp_path / "out", overwrite=True)
    assert Receipt.load(tmp_path / "out").run["resumed"] == []


def test_a_fresh_process_reloads_stock_output_without_moekit(
    case: tuple[Checkpoint, Plan, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The one test that pays for real new processes: one that loads, one that finds a tensor missing."""
    _, _, folder = case
    found = reload_in_fresh_process(folder / "whole" / "out", with_moekit=False)
    assert found["how"] == "loaded in a fresh process"
    assert found["finite"] is True
    (tmp_path / "broken").mkdir()
    for name, data in whole.items():
        if name != "model-00009-of-00009.safetensors":
            (tmp_path / "broken" / name).write_bytes(data)
    with pytest.raises(OutputError, match=r"broken is not published: stock transformers cannot load it"):
        reload_in_fresh_process(tmp_path / "broken", with_moekit=False)
