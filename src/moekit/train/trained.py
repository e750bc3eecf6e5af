"""A recipe carried out into a folder: the model as transformers saves it, what happened in every step, the recipe.

While it lasts everything is in ``.NAME.training`` beside the folder; the same command takes it up again from there,
and the folder gets its name when all of it is written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from moekit.errors import OptionError, OutputError
from moekit.train.loop import Record
from moekit.train.recipe import Recipe, Training, carry_out
from moekit.train.sequences import Batches

METRICS = "metrics.jsonl"
RECIPE = "recipe.json"
Drawing = Callable[[list[dict[str, Any]], Path], object]


def train_to(
    recipe: Recipe,
    batches: Batches,
    output: Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    draw: Drawing | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Train the recipe's model and write it; killed at any instant, the same call goes on where it was.

    ``draw`` is given the lines of ``metrics.jsonl`` and the folder. On several ranks (``torchrun``) each trains on its
    share of every batch, and the first writes.

    Raises:
        OutputError: the folder exists, or the model that was saved is not the one trained.
        OptionError: see :func:`carry_out`.
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another folder or give --overwrite")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    work = output.with_name(f".{output.name}.training")
    work.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        _begin(work / RECIPE, recipe)
    with Log(work / (METRICS if rank == 0 else f"{METRICS}.{rank}")) as log:
        own = sharded(batches, rank, world) if world > 1 else batches
        model, record = carry_out(recipe, own, folder=work / str(rank), after_step=log, progress=progress)
    if rank == 0:
        model.save_pretrained(work)
        check(model.eval(), work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if draw is not None:
            draw([json.loads(line) for line in (work / METRICS).read_text().splitlines()], work)
        for number in range(world):
            shutil.rmtree(work / str(number), ignore_errors=True)
        if output.exists():
            shutil.rmtree(output)
        work.replace(output)
    return record


def _begin(path: Path, recipe: Recipe) -> None:
    """Write down what is carried out here; OptionError where that is another recipe than before."""
    sizes = {"batch": recipe.batch, "length": recipe.length}
    told = {"model": dict(recipe.model), "train": asdict(recipe.options) | sizes, "schedule": list(recipe.schedule)}
    text = json.dumps(told, indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise OptionError(
            f"{path.parent} holds an unfinished run of another recipe: remove it or choose another folder"
        )
    path.write_text(text, encoding="utf-8")


@torch.no_grad()
def check(model: Any, folder: Path) -> None:
    """OutputError unless the folder holds the model that was trained: a schedule may have moved it from its config."""
    from moekit.nn.model import MoekitForCausalLM

    ids = torch.arange(32)[None] % model.config.vocab_size
    again = MoekitForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    if not torch.allclose(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5):
        raise OutputError(
            "the saved model is not the trained one: a [[schedule]] ends with other values than [model] says; give "
            "[model] the values that training ends with"
        )


def sharded(batches: Batches, rank: int, world: int) -> Batches:
    """A rank's rows of every batch: each ``world``-th."""
    return lambda step: {name: rows[rank::world] for name, rows in batches(step).items()}


class Log:
    """``metrics.jsonl``, a line per step. A run taken up again first loses the lines that its state does not know."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.perf_counter()
        self.file: IO[str] | None = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def __call__(self, step: int, record: Record, running: Training) -> None:
        """One more step is done."""
        if self.file is None:
            before = self.path.read_text().splitlines(keepends=True)[: step - 1] if self.path.is_file() else []
            self.path.write_text("".join(before), encoding="utf-8")
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
        line = {
            "step": step,
            "loss": record.losses[-1],
            **{name: values[-1] for name, values in record.parts.items()},
            "learning_rate": running.recipe.options.learning_rate * running.recipe.options.factor(step - 1),
            "load": [count.tolist() for count in running.load],
            "seconds": round(time.perf_counter() - self.began, 3),
        }
        self.file.write(json.dumps(line) + "\n")
