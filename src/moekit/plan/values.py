"""Values a method computed: stored experts that no weighted sum of source experts gives (calibrated rounding, factors).

The plan stays a document one can read: it says what every stored expert was made of and in which format it lies, and
names, by its SHA-256, a safetensors file that holds the numbers. Methods hand over one layer's bank at a time and it is
spooled to disk at once, so that planning holds one layer whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.bank import SILU_MUL, Activation, ExpertBank
from moekit.checkpoint.headers import TensorInfo, read_header
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.shards import layout, write_shard
from moekit.errors import PlanError
from moekit.formats import DenseBank, allocate, with_tensors

DENSE = "dense"
EDITS = "edits/"
"""Prefix of whole source tensors that are replaced (a norm, a router), before their name."""


@dataclass(frozen=True)
class Values:
    """The numbers of one layer's stored experts, on disk.

    ``description`` is the bank's ``describe()`` as JSON, ``edits`` the source tensors that are replaced, ``chosen``
    the experts of the file that are meant, in order (None: all). ``path`` is None where the file is not at hand.
    """

    description: str
    digest: str
    edits: tuple[str, ...] = ()
    chosen: tuple[int, ...] | None = None
    path: Path | None = field(default=None, compare=False)

    @property
    def describe(self) -> dict[str, Any]:
        return json.loads(self.description)

    @property
    def format(self) -> str:
        return self.describe.get("format", "packed")

    @property
    def dense(self) -> bool:
        """Whether these are plain weights, which any output format can hold."""
        return self.format == DENSE

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        if self.path is None:
            raise PlanError(
                f"the plan's computed values are not beside it ({self.digest[:12]}.safetensors is missing): "
                "keep PLAN.json and PLAN.values together, or make the plan again"
            )
        return read_header(self.path)

    @cached_property
    def _reader(self) -> Reader:
        infos = self._infos
        assert self.path is not None
        return Reader(self.path.parent, infos)

    @property
    def names(self) -> list[str]:
        """Tensors of the bank, by their names in it."""
        return [name for name in self._infos if not name.startswith(EDITS)]

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file. PlanError if it is not at hand."""
        return self._reader.read(name)

    def edit(self, name: str) -> Tensor:
        """What replaces the source tensor ``name``."""
        return self.tensor(EDITS + name)

    def bank(self, experts: Sequence[int] | None = None, activation: Activation = SILU_MUL) -> ExpertBank:
        """The stored experts (those named, of the chosen ones), as they will lie on disk; only their bytes are read."""
        chosen = self.chosen if experts is None else [self.chosen[e] if self.chosen else e for e in experts]
        if self.dense:
            made = {name: self._rows(name, chosen) for name in self.names}
            return DenseBank(**made, activation=activation)
        bank = with_tensors(self.empty(activation), {name: self.tensor(name) for name in self.needed(chosen)})
        return bank if chosen is None else bank.select(list(chosen))

    def empty(self, activation: Activation = SILU_MUL) -> Any:
        """The bank of the whole file on the meta device."""
        describe = self.describe
        hidden, inner = describe.pop("sizes")
        return allocate(describe, hidden, inner, activation, device="meta")

    def needed(self, chosen: Sequence[int] | None) -> list[str]:
        """Names of the tensors that some experts need: their own and those all share."""
        wanted = None if chosen is None else {str(e) for e in chosen}
        return [n for n in self.names if wanted is None or n.split(".")[0] in wanted or not n.split(".")[0].isdigit()]

    def select(self, experts: Sequence[int]) -> Values:
        """The same numbers of fewer experts; ``experts`` counts among the chosen."""
        return replace(self, chosen=tuple(self.chosen[e] if self.chosen else e for e in experts))

    def _rows(self, name: str, chosen: Sequence[int] | None) -> Tensor:
        if chosen is None:
            return self.tensor(name)
        return torch.cat([self._reader.rows(name, e, e + 1) for e in chosen])


class Spool:
    """A folder that takes the values of one layer after another; a file's name is the SHA-256 of its bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, bank: ExpertBank, edits: Mapping[str, Tensor] | None = None) -> Values:
        """Write a bank, and tensors of the source that are replaced, and forget them."""
        tensors = {**bank.tensors(), **{EDITS + name: tensor for name, tensor in (edits or {}).items()}}
        describe = {"format": DENSE} if isinstance(bank, DenseBank) else dict(bank.describe())  # type: ignore[attr-defined]
        describe["sizes"] = [bank.hidden_size, bank.intermediate_size]
        return self.write(tensors, describe, tuple(edits or ()))

    def write(self, tensors: Mapping[str, Tensor], describe: Mapping[str, Any], edits: tuple[str, ...] = ()) -> Values:
        """Write any tensors under a description."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        os.close(handle)
        write_shard(Path(partial), layout(tensors))
        digest = _sha256(Path(partial))
        path = self.folder / f"{digest}.safetensors"
        Path(partial).replace(path)
        return Values(json.dumps(describe, sort_keys=True), digest, edits, None, path)

    def tidy(self, kept: Collection[str] = ()) -> None:
        """Remove everything but the files of these digests, and the folder if nothing is left."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.stem not in kept:
                path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def forget_notes(self) -> None:
        """Remove notes on layers that hold no computed values: they are cheap to plan again."""
        notes = {path.stem for path in self.folder.glob("*.json")}
        held = [path for path in self.folder.glob("*.safetensors") if path.stem not in notes]
        there = {path.suffix for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if not held and there <= _NOTES:
            self.tidy()


_NOTES = {".json", ".safetensors"}
_SPOOL: ContextVar[Spool | None] = ContextVar("moekit_spool", default=None)


@contextmanager
def spooling(folder: str | os.PathLike[str]) -> Iterator[Spool]:
    """Values computed inside go to ``folder``, and stay there until :meth:`Spool.tidy`."""
    spool = Spool(Path(folder))
    token = _SPOOL.set(spool)
    try:
        yield spool
    finally:
        _SPOOL.reset(token)
        spool.forget_notes()


def spool() -> Spool | None:
    """The folder of :func:`spooling`, if inside."""
    return _SPOOL.get()


def keep(bank: ExpertBank, edits: Mapping[str, Tensor] | None = None) -> Values:
    """Hand over one layer's computed experts: to the folder of :func:`spooling`, else to one that this process owns."""
    return (_SPOOL.get() or _own_spool()).keep(bank, edits)


def keep_rewrite(describe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Values:
    """Hand over a rewrite of one layer's routing: its ``describe()`` and its ``state_dict()``."""
    return (_SPOOL.get() or _own_spool()).write(tensors, describe)


@cache
def _own_spool() -> Spool:
    import atexit

    folder = tempfile.mkdtemp(prefix="moekit-values-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Spool(Path(folder))


def folder_of(plan: Path) -> Path:
    """Where the values of a plan file lie."""
    return plan.with_suffix(".values")


def store(values: Values, folder: Path) -> None:
    """Let ``folder`` hold the file, linked where the file system can."""
    target = folder / f"{values.digest}.safetensors"
    if values.path is None or target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.link(values.path, target)
    except OSError:
        partial = target.with_suffix(".partial")
        shutil.copyfile(values.path, partial)
        partial.replace(target)


def find(values: Values, folder: Path) -> Values:
    """The same values with the file that ``folder`` holds, if it does.

    Raises:
        PlanError: the file is there but holds something else.
    """
    path = folder / f"{values.digest}.safetensors"
    if not path.is_file():
        return values
    if _sha256(path) != values.digest:
        raise PlanError(f"{path} does not hold what the plan computed: its content has changed")
    return replace(values, path=path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
