"""Writing a checkpoint so that it is whole or not there: units, a journal, and one rename at the end.

Everything is written to a hidden sibling, ``.NAME.partial``. A finished unit (one layer, say) is sealed in shards of
its own and entered in the journal; a run killed at any instant goes on after the last entry when the same job is given
again, and the bytes are those of an undisturbed run. The source is only ever read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from moekit.checkpoint import journal
from moekit.checkpoint.companions import companion_files
from moekit.checkpoint.shards import Lazy, Written, layout, split, write_shard
from moekit.errors import CheckpointError, OutputError

MAX_SHARD_BYTES = 5_000_000_000
"""As ``save_pretrained`` does: no file above 5 GB unless a single tensor is larger."""

_SCRATCH = "scratch-"


class Source(Protocol):
    """What the writer needs of a checkpoint: where it lies and what its config says."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


class Writer:
    """A checkpoint being written.

    ``with Writer(out, source=ckpt, job=job) as w:`` then, for each unit in a fixed order, ``if not w.done(unit):
    w.put(unit, tensors)``, then ``w.publish()``. Leaving the block without publishing keeps the partial folder as long
    as it holds a finished unit.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        source: Source,
        job: Mapping[str, Any],
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """
        Args:
            output: folder to be published; its parents are made.
            source: where config and companion files come from.
            job: JSON that tells this job from any other; only an equal job resumes.
            overwrite: replace an existing output at publication, and forget an unfinished one of another job.
            max_shard_bytes: size above which a unit is split into several files.

        Raises:
            OutputError: the output exists, is the source, is being written, cannot be written, or holds another job.
        """
        self.output = Path(output).resolve()
        self.partial = self.output.with_name(f".{self.output.name}.partial")
        self._old = self.output.with_name(f".{self.output.name}.old")
        self._source, self._overwrite, self._max_shard_bytes = source, overwrite, max_shard_bytes
        self._units: dict[str, dict[str, Any]] = {}
        self._sealed = False
        if self.output == Path(source.path).resolve():
            raise OutputError(f"{output} is the source itself, which is never modified; choose another output")
        with self._storage():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._finish_swap(job)
            self.partial.mkdir(exist_ok=True)
            self._journal = journal.Journal(self.partial, job, restart=overwrite)
            self._recover()
        self.resumed = tuple(self._units)
        """Units that an earlier, interrupted run had finished."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._journal.close()
        # Units made from a damaged source are of no use to a later run: nothing is left of them.
        damaged = kind is not None and issubclass(kind, CheckpointError)
        if (damaged or not self._units) and self.partial.is_dir():
            shutil.rmtree(self.partial)

    @property
    def tensors(self) -> dict[str, Written]:
        """Every tensor written so far, by name."""
        found = ((n, t) for unit in self._units.values() for file in unit["files"] for n, t in file["tensors"].items())
        return {name: Written(t[0], tuple(t[1]), t[2], t[3]) for name, t in found}

    def note(self, unit: str) -> Any:
        """What :meth:`put` was told about a finished unit."""
        return self._units[unit]["note"]

    def done(self, unit: str) -> bool:
        """Whether the unit is finished, in this run or an earlier one."""
        return unit in self._units

    def put(self, unit: str, tensors: Mapping[str, Tensor | Lazy], note: Any = None) -> None:
        """Write and seal one unit; on return it survives a crash. ``note`` (JSON) is kept beside it in the journal.

        Raises:
            OutputError: a name was written before, or the disk cannot take it (finished units are kept).
        """
        if twice := self.tensors.keys() & tensors.keys():
            raise OutputError(f"tensor {min(twice)} was already written by an earlier unit; names must be unique")
        files = []
        with self._storage():
            for part, run in enumerate(split(layout(tensors), self._max_shard_bytes)):
                name = f"unit-{len(self._units):05d}-{part:05d}.safetensors"
                written = write_shard(self.partial / name, run)
                size = (self.partial / name).stat().st_size
                files.append({"name": name, "size": size, "tensors": {k: list(t) for k, t in written.items()}})
            journal.fsync_folder(self.partial)
            record = {"unit": unit, "files": files, "note": note}
            self._journal.add(record)
        self._units[unit] = record

    def write_file(self, name: str, data: bytes) -> None:
        """Add a small file (plan, receipt, model card) beside the weights."""
        with self._storage(), (self.partial / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def scratch(self, name: str) -> Path:
        """Path of a working file or folder that survives a crash and is removed at publication."""
        return self.partial / f"{_SCRATCH}{name}"

    def seal(self, config: Mapping[str, Any] | None = None) -> Path:
        """Make the partial folder a complete checkpoint under its final names: shards, index, config, companions.

        Returns:
            The partial folder, loadable as it lies, for whoever wants to check it before :meth:`publish`.
        """
        files = [file for unit in self._units.values() for file in unit["files"] if file["tensors"]]
        final = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        final = final if len(files) > 1 else ["model.safetensors"]
        names = {file["name"]: name for file, name in zip(files, final, strict=True)}
        with self._storage():
            self._journal.add({"sealing": names})
            for old, new in names.items():
                (self.partial / old).rename(self.partial / new)
            for path in self.partial.glob("unit-*.safetensors"):
                path.unlink()
        if len(files) > 1:
            self.write_file("model.safetensors.index.json", _index(files, names))
        merged = dict(self._source.config if config is None else config)
        self.write_file("config.json", (json.dumps(merged, indent=2, ensure_ascii=False) + "\n").encode())
        for name, path in companion_files(Path(self._source.path)):
            with self._storage():
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            self.write_file(name, path.read_bytes())
        self._sealed = True
        return self.partial

    def publish(self) -> Path:
        """Rename the folder to its final name; an output that it replaces is removed only afterwards."""
        if not self._sealed:
            self.seal()
        with self._storage():
            for path in self.partial.glob(f"{_SCRATCH}*"):
                _remove(path)
            journal.fsync_folder(self.partial)
            if self.output.exists():
                if not self._overwrite:
                    raise OutputError(f"{self.output} appeared while it was being written; it is left as it is")
                self.output.rename(self._old)
            self.partial.rename(self.output)
            journal.fsync_folder(self.output.parent)
            (self.output / journal.NAME).unlink()
            journal.fsync_folder(self.output)
            if self._old.exists():
                shutil.rmtree(self._old)
        return self.output

    def _finish_swap(self, job: Mapping[str, Any]) -> None:
        """Put right what a crash between the renames of :meth:`publish` left behind; refuse an existing output."""
        if self._old.exists():
            if self.output.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.output)
        leftover = self.output / journal.NAME
        if leftover.is_file() and not self.partial.exists():
            records, _ = journal.read(leftover)
            if records and journal.canonical(records[0].get("job")) == journal.canonical(job):
                self.output.rename(self.partial)
        if self.output.exists() and not self._overwrite:
            raise OutputError(f"{self.output} exists; pass --overwrite to replace it, or choose another output")
        if self.output.is_dir() and any(self.output.iterdir()) and not (self.output / "config.json").is_file():
            raise OutputError(
                f"{self.output} holds something other than a model, which is never replaced: move it away"
            )

    def _recover(self) -> None:
        """Take over finished units whose files are whole; drop everything else."""
        for record in self._journal.records:
            for old, new in record.get("sealing", {}).items():
                if (self.partial / new).exists():
                    (self.partial / new).rename(self.partial / old)
        kept = {journal.NAME}
        for record in self._journal.records:
            if "unit" not in record:
                continue
            sizes = {file["name"]: file["size"] for file in record["files"]}
            if any(
                not (self.partial / n).is_file() or (self.partial / n).stat().st_size != s for n, s in sizes.items()
            ):
                break
            self._units[record["unit"]] = record
            kept |= sizes.keys()
        for path in self.partial.iterdir():
            if path.name not in kept and not path.name.startswith(_SCRATCH):
                _remove(path)

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """Say in one line what the operating system refused."""
        try:
            yield
        except OSError as error:
            kept = f"; {len(self._units)} finished units are kept, repeat the command to go on" if self._units else ""
            reason = error.strerror or str(error)
            raise OutputError(f"cannot write {self.output}: {reason}{kept}") from error


def _index(files: list[dict[str, Any]], names: Mapping[str, str]) -> bytes:
    weight_map = {tensor: names[file["name"]] for file in files for tensor in file["tensors"]}
    total = sum(tensor[2] for file in files for tensor in file["tensors"].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
