"""From a built model to a folder: stock files first, moekit's own format of them where it was asked for or needed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from moekit.build._builder import Builder, Built, Material
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.bars import no_bars
from moekit.checkpoint.companions import companion_files
from moekit.checkpoint.skeleton import grown
from moekit.errors import OptionError, OutputError
from moekit.plan import apply
from moekit.plan.reload import reload_in_fresh_process
from moekit.train.loop import training_device

REPORT = "build.json"
FORMATS = ("auto", "stock", "moekit")


def build(
    source: str | os.PathLike[str] | Checkpoint,
    builder: Builder,
    material: Material,
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> Built:
    """Make a Mixture-of-Experts model of a dense checkpoint, and write it where ``output`` says.

    ``format``: "stock" or "moekit"; "auto" is stock where a stock family can hold the result. ``device``: where the
    model and its teacher are held and trained. Without ``output``
    nothing is written and the model is returned. What is written is loaded again, in a process of its own, before it
    gets its name; ``build.json`` beside the weights says what was done.

    Raises:
        OptionError: a source that has experts already, or a format that cannot hold the result; the message names the
            choices. OutputError: the output exists, cannot be written, or does not load.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    if format not in FORMATS:
        raise OptionError(f"format '{format}': a build is written as {', '.join(FORMATS)}")
    place = None if output is None else Path(output).resolve()
    if place is not None:
        _check_place(place, checkpoint, overwrite)
    where = training_device(device)
    with no_bars():
        built = builder.build(load_dense(checkpoint, where), material)
        built.report.update({"builder": builder.spec, "source": checkpoint.fingerprint})
        if place is not None:
            _write(built, checkpoint, place, format)
    return built


def load_dense(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Any:
    """The dense model in float32.

    Raises:
        OptionError: it has experts already.
    """
    from transformers import AutoModelForCausalLM

    if grown(checkpoint.transformers_config) is not None:
        raise OptionError(f"{checkpoint.path} has experts already: build makes them of a dense model")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    return model.to(device)


def _check_place(place: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    if place == Path(checkpoint.path).resolve():
        raise OutputError(f"{place} is the source itself, which is never modified; choose another output")
    if place.exists() and not overwrite:
        raise OutputError(f"{place} exists: choose another folder or give --overwrite")
    if place.is_dir() and any(place.iterdir()) and not (place / "config.json").is_file():
        raise OutputError(f"{place} holds something other than a model, which is never replaced: move it away")


def _write(built: Built, checkpoint: Checkpoint, place: Path, format: str) -> None:
    """Everything under a temporary name beside the output, then one rename."""
    chosen = ("moekit" if built.no_stock else "stock") if format == "auto" else format
    if chosen == "stock" and built.no_stock:
        raise OptionError(f"no stock checkpoint holds this model: {built.no_stock}; give --format moekit")
    if chosen == "moekit" and built.export is None:
        why = f": {built.no_stock}" if built.no_stock else ", and needs none: give --format stock"
        raise OptionError(f"this model has no form in moekit's own format{why}")
    dtype = checkpoint.transformers_config.dtype
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as scratch:
            stock = Path(scratch) / "stock"
            carrier = built.carrier if built.carrier is not None else built.model
            _save(carrier, dtype if isinstance(dtype, torch.dtype) else torch.float32, stock)
            for name, path in companion_files(Path(checkpoint.path)):
                if not (stock / name).exists():
                    (stock / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, stock / name)
            if chosen == "moekit":
                assert built.export is not None
                ready, carried = Path(scratch) / "moekit", Checkpoint.open(stock)
                built.report["reload"] = apply(carried, built.export(carried), ready, format="moekit").reload
            else:
                ready = stock
                built.report["reload"] = reload_in_fresh_process(ready, with_moekit=False)
            built.report["format"] = chosen
            (ready / REPORT).write_text(json.dumps(built.report, indent=1, sort_keys=True) + "\n", "utf-8")
            _put(ready, place)
    except OSError as error:
        raise OutputError(f"cannot write {place}: {error.strerror or error}") from error


def _put(ready: Path, place: Path) -> None:
    """One rename; an output that is replaced is removed only afterwards."""
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        place.rename(old)
    ready.rename(place)
    if old.exists():
        shutil.rmtree(old)


def _save(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """As ``save_pretrained`` does, in the source's dtype; the live model keeps its own."""
    state = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    before, model.config.dtype = model.config.dtype, dtype
    model.save_pretrained(folder, state_dict=state)
    model.config.dtype = before
