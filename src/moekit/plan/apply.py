"""Applying a plan: one streaming pass from source to output, journaled, checked, then published by a rename."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.checkpoint import Checkpoint, Writer
from moekit.checkpoint.companions import companion_files
from moekit.errors import OutputError, PlanError
from moekit.measure import Windows
from moekit.plan import held_out, receipt
from moekit.plan.card import model_card
from moekit.plan.document import Plan
from moekit.plan.engines import expectations
from moekit.plan.loadable import dry_load, problems
from moekit.plan.produce import Production, produce
from moekit.plan.receipt import Receipt
from moekit.plan.reload import reload_in_fresh_process
from moekit.stream import memory

PLAN = "plan.json"
Progress = Callable[[str, int, int], None]

_PYTHON_BYTES = 700_000_000
"""What a fresh process that loads a model takes besides the weights."""


def apply(
    source: str | os.PathLike[str] | Checkpoint,
    plan: Plan | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text: held_out.Text | None = None,
    max_ram: int | float | str | None = None,
    format: str = "auto",
    materialise: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Receipt:
    """Write the checkpoint that ``plan`` makes of ``source``; published only if it loads.

    Args:
        text: held-out text (or token ids), by domain or not, on which output and source are compared.
        max_ram: cap on this process's peak resident set, in bytes or as "3GB".
        format: "auto", "stock", "moekit" or "compressed-tensors"; see :mod:`moekit.plan.target`.
        materialise: let stock formats pad layers and repeat shared experts.
        progress: told (what, done, total): of the source on the held-out text, of the units written, of the output.

    Raises:
        PlanError: the plan does not fit the source, or the format cannot express it; before anything is written.
        BudgetError: the cap is below what the largest unit of work needs; names the smallest that works.
        OutputError: the output exists, cannot be written, or does not load; what is finished is kept to resume.
    """
    started = time.monotonic()
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    plan = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
    cap = memory.cap(max_ram)
    production = produce(checkpoint, plan, format, materialise)
    _check_loadable(checkpoint, production)
    windows = None if text is None else held_out.cut(checkpoint, text)
    tell = progress or (lambda what, done, total: None)
    _require(cap, checkpoint, production, windows)
    job = _job(checkpoint, plan, production, materialise)
    with Writer(output, source=checkpoint, job=job, overwrite=overwrite) as writer:
        run = _Run(checkpoint, plan, production, writer, cap, device, tell)
        recording = run.record(windows) if windows is not None else None
        run.write()
        run.seal()
        return run.finish(job, recording, started)


def _job(checkpoint: Checkpoint, plan: Plan, production: Production, materialise: bool) -> dict[str, Any]:
    return {
        "source": checkpoint.fingerprint,
        "plan": plan.fingerprint,
        "format": production.target.format,
        "materialise": materialise,
        "moekit": moekit.__version__,
        "torch": torch.__version__,
    }


def _require(cap: memory.Cap, checkpoint: Checkpoint, production: Production, text: Windows | None) -> None:
    """BudgetError at once if the cap is below what the largest piece of work takes, whichever that is."""
    if cap.limit is None:
        return
    largest = max(production.units, key=lambda unit: unit.working_bytes)
    needs = {f"rewriting {largest.name}": largest.working_bytes}
    if text is not None:
        needs["running the source on the held-out text"] = held_out.needed_bytes(checkpoint, text)
    what, need = max(needs.items(), key=lambda item: item[1])
    cap.require(need, what)


def _check_loadable(checkpoint: Checkpoint, production: Production) -> None:
    """PlanError if transformers would not load what is about to be written, beyond what it says of the source."""
    specs = {name: (lazy.dtype, lazy.shape) for name, lazy in production.tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(production.config))
        found = dry_load(Path(folder), specs)
    if "error" in found or not problems(found):
        return
    before = dry_load(checkpoint.path, {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()})
    new = sorted(set(problems(found)) - set(problems(before)))
    if new:
        raise PlanError(
            f"{checkpoint.model_type} would not load what this plan leaves in the {production.target.format} format: "
            f"{new[0]}" + (f", and {len(new) - 1} more" if len(new) > 1 else "")
        )


@dataclass
class _Run:
    checkpoint: Checkpoint
    plan: Plan
    production: Production
    writer: Writer
    cap: memory.Cap
    device: str
    tell: Progress

    def record(self, windows: Windows) -> held_out.Recording:
        """The source's logits, before anything is written."""
        recording = held_out.Recording(self.writer.scratch("held-out"), windows, self.checkpoint.fingerprint)
        tell = partial(self.tell, "measuring the source")
        held_out.record_source(self.checkpoint, recording, device=self.device, max_ram=self.cap, progress=tell)
        memory.trim()
        return recording

    def write(self) -> None:
        units = self.production.units
        for done, unit in enumerate(units):
            if not self.writer.done(unit.name):
                self.writer.put(unit.name, unit.tensors)
                if self.cap.limit is not None:
                    memory.trim()
            self.tell("writing", done + 1, len(units))

    def seal(self) -> None:
        self.writer.seal(self.production.config)
        self.plan.save(self.writer.partial / PLAN, overwrite=True, with_values=False)

    def finish(self, job: Mapping[str, Any], recording: held_out.Recording | None, started: float) -> Receipt:
        reload = self._reload()
        divergence = None
        if recording is not None:
            output = Checkpoint.open(self.writer.partial)
            tell = partial(self.tell, "measuring the output")
            found = held_out.divergence(output, recording, device=self.device, max_ram=self.cap, progress=tell)
            divergence = {**found.as_dict(), "text": held_out.fingerprint(recording.text)}
        files = [name for name, _ in companion_files(self.checkpoint.path)]
        done = Receipt(
            **receipt.accounts(self.checkpoint, self.plan, self.production, self.writer.tensors),
            job=job,
            reload=reload,
            loadable=expectations(self.production, files),
            divergence=divergence,
            versions=receipt.versions(),
            run={
                "wall_seconds": round(time.monotonic() - started, 3),
                "peak_memory_bytes": memory.peak_rss(),
                "max_ram_bytes": self.cap.limit,
                "source_bytes_read": self.checkpoint.counted_bytes,
                "resumed": list(self.writer.resumed),
            },
        )
        self.writer.write_file(receipt.NAME, done.to_json().encode())
        self.writer.write_file("README.md", model_card(done, self.writer.output.name).encode())
        self.writer.publish()
        return done

    def _reload(self) -> dict[str, Any]:
        """Proof that the sealed folder loads, in the strongest way that the cap and this machine allow."""
        folder = self.writer.partial
        written = {n: (lazy.dtype, lazy.shape) for n, lazy in self.production.tensors.items()}
        dry = dry_load(folder, written)
        if "error" in dry:
            return self._unreadable(dry)
        need = dry["parameters"] * dry.pop("itemsize") + _PYTHON_BYTES
        room = self.cap.limit if self.cap.limit is not None else memory.free_memory()
        excused = self._said_of_the_source() if problems(dry) else frozenset()
        if need < room:
            own = self.production.target.format == "moekit" or self.checkpoint.own_class
            return reload_in_fresh_process(folder, with_moekit=own, excused=excused)
        if found := [one for one in problems(dry) if one not in excused]:
            raise OutputError(f"{folder} is not published: stock transformers would load it with {found[0]}")
        return dry

    def _said_of_the_source(self) -> frozenset[str]:
        """What stock transformers finds wrong with the source: weights it has no place for stay without one."""
        infos = self.checkpoint.tensors.items()
        return frozenset(problems(dry_load(self.checkpoint.path, {n: (info.dtype, info.shape) for n, info in infos})))

    def _unreadable(self, dry: dict[str, Any]) -> dict[str, Any]:
        """A layout that transformers cannot read here: excused only if it cannot read the source either."""
        infos = self.checkpoint.tensors.items()
        before = dry_load(self.checkpoint.path, {name: (info.dtype, info.shape) for name, info in infos})
        if before.get("error") != dry["error"]:
            raise OutputError(
                f"{self.writer.partial} is not published: stock transformers cannot load it: {dry['error']}"
            )
        return {"how": "not possible on this machine, for the source neither", "error": dry["error"]}
