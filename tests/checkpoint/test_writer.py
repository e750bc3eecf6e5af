"""The writer: whole or not there, resumable at any point, byte for byte the same."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekit.checkpoint import journal, shards
from moekit.checkpoint.shards import Lazy
from moekit.checkpoint.writer import Writer
from moekit.errors import CheckpointError, OutputError


@dataclass
class Folder:
    path: Path
    config: dict[str, Any] = field(default_factory=lambda: {"model_type": "tiny", "num_experts": 4})


@pytest.fixture
def source(tmp_path: Path) -> Folder:
    folder = tmp_path / "source"
    (folder / "templates").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "merges.txt", "plan.json", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    for name in (
        "pytorch_model.bin",
        "modeling_custom.py",
        "README.md",
        ".hidden.json",
        "LICENSE",
        "templates/a.jinja",
    ):
        (folder / name).write_text(name)
    return Folder(folder)


def unit(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{seed}.weight": torch.randn(3, 5, generator=generator, dtype=torch.bfloat16),
        f"layers.{seed}.scale": torch.randn(7, generator=generator),
        f"layers.{seed}.packed": torch.randint(0, 255, (4, 3), generator=generator, dtype=torch.uint8),
        f"layers.{seed}.count": torch.tensor(seed),
    }


def write(output: Path, source: Folder, units: int = 3, stop_after: int | None = None, **options: Any) -> Writer:
    with Writer(output, source=source, job={"plan": "p"}, **options) as writer:
        for index in range(units):
            if index == stop_after:
                raise KeyboardInterrupt
            if not writer.done(f"layer {index}"):
                writer.put(f"layer {index}", unit(index), note={"index": index})
        writer.publish()
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_published_folder_is_a_checkpoint(tmp_path: Path, source: Folder) -> None:
    writer = write(tmp_path / "new" / "out", source)
    found = contents(tmp_path / "new" / "out")
    assert sorted(found) == [
        "LICENSE",
        "config.json",
        "merges.txt",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "templates/a.jinja",
        "tokenizer.json",
    ]
    index = json.loads(found["model.safetensors.index.json"])
    assert index["weight_map"]["layers.1.scale"] == "model-00002-of-00003.safetensors"
    assert index["metadata"]["total_size"] == 3 * (30 + 28 + 12 + 8)
    for seed in range(3):
        loaded = load_file(tmp_path / "new" / "out" / f"model-0000{seed + 1}-of-00003.safetensors")
        assert loaded.keys() == unit(seed).keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in unit(seed).items())
    assert not list((tmp_path / "new").glob(".out*"))
    sha = hashlib.sha256(unit(1)["layers.1.packed"].numpy().tobytes()).hexdigest()
    assert writer.tensors["layers.1.packed"].sha256 == sha
    assert writer.note("layer 2") == {"index": 2}


def test_one_unit_needs_no_index(tmp_path: Path, source: Folder) -> None:
    write(tmp_path / "out", source, units=1)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_every_dtype_survives_and_is_aligned(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(3).to(dtype) for dtype in shards.DTYPE_NAMES if dtype is not torch.float8_e8m0fnu
    }
    tensors["empty"], tensors["strided"] = torch.empty(0, 4), torch.arange(12.0).reshape(3, 4).T
    shards.write_shard(tmp_path / "x.safetensors", shards.layout(tensors))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor), name
    data = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"w has dtype torch.complex128, which the safetensors format cannot hold"):
        shards.write_shard(tmp_path / "x", shards.layout({"w": torch.zeros(1, dtype=torch.complex128)}))


def test_large_units_are_split_and_lazy_tensors_made_one_at_a_time(tmp_path: Path, source: Folder) -> None:
    alive: list[int] = []

    def make(value: int) -> Tensor:
        alive.append(value)
        return torch.full((10,), float(value))

    tensors = {f"t{i}": Lazy(torch.float32, (10,), lambda i=i: make(i)) for i in range(5)}
    with Writer(tmp_path / "out", source=source, job={}, max_shard_bytes=80) as writer:
        assert alive == []
        writer.put("all", tensors)
        writer.publish()
    assert alive == [0, 1, 2, 3, 4]
    assert len(list((tmp_path / "out").glob("model-*-of-00003.safetensors"))) == 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"


@pytest.mark.parametrize("stop_after", [1, 2])
def test_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, source: Folder, stop_after: int) -> None:
    write(tmp_path / "whole", source)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", source, stop_after=stop_after)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    (partial / "unit-00009-00000.safetensors").write_bytes(b"a shard that was being written")
    with (partial / journal.NAME).open("ab") as file:
        file.write(b'{"unit":"layer 2","fil')
    writer = write(tmp_path / "out", source)
    assert writer.resumed == tuple(f"layer {i}" for i in range(stop_after))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_unit_whose_file_is_short_is_redone(tmp_path: Path, source: Folder) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", source, stop_after=2)
    shard = tmp_path / ".out.partial" / "unit-00001-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert write(tmp_path / "out", source).resumed == ("layer 0",)


@pytest.mark.parametrize("step", range(12))
def test_killed_at_every_rename_and_unlink(
    tmp_path: Path, source: Folder, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publication is a handful of renames; after a death before any of them, repeating the command gives the output."""
    write(tmp_path / "whole", source)
    (tmp_path / "out").mkdir()
    for name in ("old", "config.json"):
        (tmp_path / "out" / name).write_text("old")
    calls = 0
    real = {name: getattr(Path, name) for name in ("rename", "unlink")}

    def dying(name: str) -> Any:
        def call(self: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise KeyboardInterrupt
            return real[name](self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(Path, name, dying(name))
        try:
            write(tmp_path / "out", source, overwrite=True)
        except KeyboardInterrupt:
            there = tmp_path / "out" if (tmp_path / "out").exists() else tmp_path / ".out.old"
            assert (there / "old").exists() or (there / "model.safetensors.index.json").exists()
    write(tmp_path / "out", source, overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_death_between_publication_and_the_end_of_the_journal(tmp_path: Path, source: Folder) -> None:
    write(tmp_path / "whole", source)
    write(tmp_path / "out", source)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "other", source, stop_after=2)
    lines = (tmp_path / ".other.partial" / journal.NAME).read_text()
    (tmp_path / "out" / journal.NAME).write_text(lines)
    assert write(tmp_path / "out", source).output == tmp_path / "out"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_job_is_refused_unless_it_may_start_anew(tmp_path: Path, source: Folder) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", source, stop_after=1)
    with pytest.raises(OutputError, match=r"unfinished output of another job \(different plan\); repeat that job"):
        Writer(tmp_path / "out", source=source, job={"plan": "q"})
    with Writer(tmp_path / "out", source=source, job={"plan": "q"}, overwrite=True) as writer:
        assert writer.resumed == ()
        assert [p.name for p in writer.partial.iterdir()] == [journal.NAME]


def test_existing_output_and_source_are_never_touched(tmp_path: Path, source: Folder) -> None:
    (tmp_path / "out").mkdir()
    before = contents(source.path)
    with pytest.raises(OutputError, match=r"out exists; pass --overwrite to replace it, or choose another output"):
        Writer(tmp_path / "out", source=source, job={})
    with pytest.raises(OutputError, match=r"is the source itself, which is never modified; choose another output"):
        Writer(source.path, source=source, job={}, overwrite=True)
    write(tmp_path / "out", source, overwrite=True)
    assert contents(source.path) == before


def test_overwriting_replaces_models_only(tmp_path: Path, source: Folder) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "dear.txt").write_text("keep me")
    with pytest.raises(OutputError, match=r"letters holds something other than a model, which is never replaced"):
        Writer(letters, source=source, job={}, overwrite=True)
    assert contents(letters) == {"dear.txt": b"keep me"}


def test_a_damaged_source_leaves_nothing_behind(tmp_path: Path, source: Folder) -> None:
    def damaged() -> None:
        with Writer(tmp_path / "out", source=source, job={}) as writer:
            writer.put("layer 0", unit(0))
            raise CheckpointError("NaN in layer 1")

    with pytest.raises(CheckpointError, match="NaN"):
        damaged()
    assert not list(tmp_path.glob("*out*"))


def test_two_writers_of_one_output(tmp_path: Path, source: Folder) -> None:
    with (
        Writer(tmp_path / "out", source=source, job={}),
        pytest.raises(OutputError, match=r"is being written by another process; wait for it or stop it"),
    ):
        Writer(tmp_path / "out", source=source, job={}, overwrite=True)


def test_full_disk_keeps_what_is_finished(tmp_path: Path, source: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, run: Any) -> Any:
        if path.name.startswith("unit-00001"):
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return shards.write_shard(path, run)

    write(tmp_path / "whole", source)
    with monkeypatch.context() as patch:
        patch.setattr("moekit.checkpoint.writer.write_shard", full)
        with pytest.raises(OutputError, match=r"out: No space left on device; 1 finished units are kept, repeat the"):
            write(tmp_path / "out", source)
    assert write(tmp_path / "out", source).resumed == ("layer 0",)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_unwritable_path_leaves_nothing(tmp_path: Path, source: Folder) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*file/out: File exists"):
        Writer(tmp_path / "file" / "out", source=source, job={})
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", source, stop_after=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


def test_a_name_is_written_once(tmp_path: Path, source: Folder) -> None:
    with Writer(tmp_path / "out", source=source, job={}) as writer:
        writer.put("a", {"w": torch.zeros(1)})
        with pytest.raises(OutputError, match=r"tensor w was already written by an earlier unit"):
            writer.put("b", {"w": torch.zeros(1)})


def test_scratch_files_live_until_publication(tmp_path: Path, source: Folder) -> None:
    with Writer(tmp_path / "out", source=source, job={}) as writer:
        writer.put("a", {"w": torch.zeros(1)})
        writer.scratch("notes").write_text("x")
    with Writer(tmp_path / "out", source=source, job={}) as writer:
        assert writer.scratch("notes").read_text() == "x"
        writer.publish()
    assert not list((tmp_path / "out").glob("scratch*"))
