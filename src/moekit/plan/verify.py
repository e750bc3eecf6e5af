"""Proving an output again, later: every tensor is computed anew from source and plan and compared bit by bit.

No hash that lies in the folder is trusted, nor is its receipt. Where a method computed values from calibration text and
the plan's file of them is not at hand, experts are held against what they were made of instead (:mod:`likeness`), and
the report names those tensors. What is taken from the folder is the plan (unless one
is given), which is checked against the source first, and the format, read off its config; a folder that claims another
format or plan than it holds then differs in config or tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moekit.checkpoint import Checkpoint
from moekit.checkpoint.companions import companion_files
from moekit.checkpoint.headers import TensorInfo, read_header
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.resolve import PICKLES, read_json
from moekit.checkpoint.shards import Lazy, sha256
from moekit.errors import MoekitError, OutputError, VerificationError
from moekit.plan import held_out, receipt
from moekit.plan.document import Plan
from moekit.plan.finite import finite
from moekit.plan.likeness import unlike
from moekit.plan.produce import Production, produce
from moekit.plan.receipt import Receipt
from moekit.stream import memory

INDEX = "model.safetensors.index.json"
_FOREIGN = (*PICKLES, "*.gguf", "*.h5", "*.msgpack")
_OWN = {"config.json", "plan.json", "plan.safetensors", receipt.NAME, INDEX, "README.md"}
_READ_BY_LOADERS = {".json", ".jinja", ".model", ".txt", ".py"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """``problems``: a line each, none if the output is what source and plan make; ``divergence`` if text was given.

    ``likened``: tensors that could not be computed again and were held against their sources only.
    """

    output: str
    source: str
    format: str | None
    tensors: int
    bytes_compared: int
    problems: tuple[str, ...]
    likened: tuple[str, ...] = ()
    divergence: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def require(self) -> None:
        """Raise VerificationError, naming the first problem, unless all is well."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
            raise VerificationError(f"{self.output} is not what its source and plan produce: {self.problems[0]}{more}")


def verify(
    output: str | os.PathLike[str],
    against: str | os.PathLike[str] | Checkpoint,
    text: held_out.Text | None = None,
    *,
    plan: Plan | None = None,
    max_ram: int | float | str | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Compare ``output`` with what the source ``against`` and the plan produce.

    Args:
        text: held-out text on which the divergence is measured again.
        plan: the plan to hold the output to; the one that lies in the output if None.
        progress: told (what, done, total): of the units computed again, of source and output on the text.

    Raises:
        OutputError: ``output`` is no folder. CheckpointError: the source cannot be read. BudgetError: the cap is too
            small for the largest unit.
    """
    folder = Path(output)
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder; name the output of apply or compress")
    source = against if isinstance(against, Checkpoint) else Checkpoint.open(against)
    cap, tell = memory.cap(max_ram), progress or (lambda what, done, total: None)
    check = _Check(folder, source)
    production = check.prepare(plan)
    if production is not None:
        largest = max(production.units, key=lambda unit: unit.working_bytes)
        cap.require(largest.working_bytes, f"computing {largest.name} again")
        check.config(production)
        check.tensors(production, partial(tell, "computing again"))
        check.likeness(production)
        check.companions()
        check.receipt(production)
    divergence = None
    if text is not None and not check.problems:
        recording = held_out.Replay(source, held_out.cut(source, text), device=device, max_ram=cap)
        measuring = partial(tell, "measuring")
        found = held_out.divergence(Checkpoint.open(folder), recording, device=device, max_ram=cap, progress=measuring)
        divergence = {**found.as_dict(), "text": held_out.fingerprint(recording.text)}
    return Report(
        output=str(folder),
        source=str(source.path),
        format=production.target.format if production else None,
        tensors=len(production.tensors) if production else 0,
        bytes_compared=check.compared,
        problems=tuple(check.problems),
        likened=tuple(sorted(production.absent)) if production else (),
        divergence=divergence,
    )


class _Check:
    def __init__(self, folder: Path, source: Checkpoint) -> None:
        self.folder, self.source = folder, source
        self.problems: list[str] = []
        self.compared = 0
        self.hashes: dict[str, str] = {}

    def prepare(self, plan: Plan | None) -> Production | None:
        """What the folder should hold; None, with the reason noted, if that cannot be said."""
        try:
            plan = plan or Plan.load(self.folder / "plan.json")
            return produce(self.source, plan, self._format(), materialise=True)
        except MoekitError as error:
            self.problems.append(str(error))
            return None

    def _format(self) -> str:
        method = (read_json(self.folder / "config.json").get("quantization_config") or {}).get("quant_method")
        own = (self.source.config.get("quantization_config") or {}).get("quant_method")
        return method if method == "moekit" or (method == "compressed-tensors" and method != own) else "stock"

    def config(self, production: Production) -> None:
        """Every field of config.json."""
        found, expected = read_json(self.folder / "config.json"), json.loads(json.dumps(production.config))
        for where, a, b in _differences(expected, found, ""):
            self.problems.append(f"config.json: {where} is {_short(b)}, expected {_short(a)}")

    def tensors(self, production: Production, progress: Callable[[int, int], None]) -> None:
        """Every tensor and every file that could hold one."""
        found = self._headers()
        expected = production.tensors
        self.problems += [f"tensor {name} is missing" for name in sorted(expected.keys() - found.keys())]
        self.problems += [
            f"tensor {name} in {found[name].file} does not belong there"
            for name in sorted(found.keys() - expected.keys())
        ]
        reader = Reader(self.folder, found)
        for done, unit in enumerate(production.units):
            for name, lazy in sorted(unit.tensors.items()):
                if name in found:
                    self._compare(name, lazy, found[name], reader, absent=name in production.absent)
            progress(done + 1, len(production.units))

    def _headers(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        listed = self._index()
        for path in sorted(self.folder.rglob("*.safetensors")):
            name = path.relative_to(self.folder).as_posix()
            if name == "plan.safetensors":
                continue
            if listed is not None and name not in listed.values():
                self.problems.append(f"{name} is a stale shard: the index does not name it")
            try:
                header = read_header(path)
            except MoekitError as error:
                self.problems.append(str(error))
                continue
            for tensor, info in header.items():
                if tensor in found:
                    self.problems.append(f"tensor {tensor} is in both {found[tensor].file} and {name}")
                if listed is not None and listed.get(tensor) not in (None, name):
                    self.problems.append(f"the index places {tensor} in {listed[tensor]}, it is in {name}")
                found[tensor] = info
            if listed is not None:
                absent = [t for t, file in listed.items() if file == name and t not in header]
                self.problems += [f"the index places {t} in {name}, which does not hold it" for t in absent]
        for pattern in _FOREIGN:
            self.problems += [f"{p.name} are weights that no plan wrote" for p in sorted(self.folder.glob(pattern))]
        return found

    def _index(self) -> dict[str, str] | None:
        """Tensor to file; None where the folder has one shard and needs no index."""
        path = self.folder / INDEX
        if not path.is_file():
            if len(list(self.folder.glob("model-*.safetensors"))) > 0:
                self.problems.append(f"{INDEX} is missing")
            return None
        listed = read_json(path).get("weight_map", {})
        self.problems += [
            f"{name} is missing, though the index names it"
            for name in sorted(set(listed.values()))
            if not (self.folder / name).is_file()
        ]
        return dict(listed)

    def likeness(self, production: Production) -> None:
        """Experts whose numbers cannot be made again look like their sources."""
        layers = [t for t in production.target.layers.values() if t.values is not None and t.values.path is None]
        if not layers or self.problems:
            return
        output = Checkpoint.open(self.folder)
        for target in layers:
            self.problems += unlike(self.source, output, target)

    def _compare(self, name: str, lazy: Lazy, info: TensorInfo, reader: Reader, *, absent: bool) -> None:
        if (info.dtype, info.shape) != (lazy.dtype, lazy.shape):
            shown = f"{info.dtype} {list(info.shape)}, expected {lazy.dtype} {list(lazy.shape)}"
            self.problems.append(f"tensor {name} is {shown}")
            return
        actual = reader.read(name)
        if absent:
            self.hashes[name] = sha256(finite(actual, name))
            return
        expected = lazy.make()
        self.compared += info.nbytes
        self.hashes[name] = sha256(expected)
        if not torch.equal(_bits(expected), _bits(actual)):
            count = int((_bits(expected) != _bits(actual)).sum())
            self.problems.append(
                f"tensor {name} differs from what source and plan give in {count} of {info.nbytes} bytes"
            )

    def companions(self) -> None:
        """Tokenizer, templates and settings are the source's, byte for byte."""
        expected = dict(companion_files(self.source.path))
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and path.suffix in _READ_BY_LOADERS and name not in _OWN | expected.keys():
                self.problems.append(f"{name} does not belong there: no plan wrote it")
        for name, path in expected.items():
            there = self.folder / name
            if not there.is_file():
                self.problems.append(f"{name} is missing")
            elif there.read_bytes() != path.read_bytes():
                self.problems.append(f"{name} differs from the source's")

    def receipt(self, production: Production) -> None:
        """The receipt must tell what was found, where it tells of it; it is never a reason to believe anything."""
        try:
            told = Receipt.load(self.folder)
        except OutputError as error:
            self.problems.append(str(error))
            return
        for name, digest in self.hashes.items():
            entry = told.output.get(name)
            if entry is None or entry.get("sha256") != digest:
                self.problems.append(f"receipt.json gives another hash for tensor {name} than source and plan do")
        fates = {name: fate.became for name, fate in production.fates.items()}
        if {name: entry.get("became") for name, entry in told.tensors.items()} != fates:
            self.problems.append("receipt.json does not account for the source's tensors as the plan does")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _differences(expected: Any, found: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            yield from _differences(expected.get(key), found.get(key), f"{where}.{key}".lstrip("."))
    elif expected != found:
        yield where, expected, found


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
