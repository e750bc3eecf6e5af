"""A recipe carried out into a folder: the model as transformers saves it, what happened in every step, the recipe.

While it lasts everything is in ``.NAME.training`` beside the folder; the same command takes it up again from there,
and the folder gets its name when all of it is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from moekit.checkpoint.bars import no_bars
from moekit.errors import OptionError, OutputError
from moekit.train.loop import RESUME, Record, processes, training_device
from moekit.train.recipe import Recipe, Training, carry_out
from moekit.train.sequences import Batches

METRICS = "metrics.jsonl"
RECIPE = "recipe.json"
LISTED = 1024
"""The most choices of a layer whose loads a line of the metrics lists: a memory of product keys has thousands."""
Drawing = Callable[[list[dict[str, Any]], Path], object]


def train_to(
    recipe: Recipe,
    batches: Batches,
    output: Path,
    *,
    data: str = "",
    tokenizer: Any = None,
    device: str = "auto",
    recompute: bool = False,
    overwrite: bool = False,
    draw: Drawing | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Train the recipe's model and write it; killed at any instant, the same call goes on where it was.

    ``data`` tells apart what batches are made of (:func:`fingerprint`): a run is not taken up with other data. With
    ``recompute`` nothing inside a layer is kept for the backward, and each is run again there. ``draw`` is given the
    lines of ``metrics.jsonl`` and the folder. On several processes (``torchrun``) each trains on its share of every
    batch, and the first writes; all must see the folder.

    Raises:
        OutputError: the folder exists, or the model that was saved is not the one trained.
        OptionError: a schedule ends with other values than the model's, the tokenizer has more tokens than the model,
            or an unfinished run is of another recipe or other data; see also :func:`carry_out`.
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another folder or give --overwrite")
    place = training_device(device)
    ranks = processes(place)
    model = recipe.build()
    _check_vocabulary(tokenizer, model.config.vocab_size)
    _check_end(recipe, model)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    work = output.with_name(f".{output.name}.training")
    if ranks.is_main_process:
        _begin(work, _told(recipe, data, tokenizer))
    with Log(work / METRICS) as log:
        model, record = carry_out(
            recipe,
            sharded(batches, ranks.process_index, ranks.num_processes),
            model.to(place),
            folder=work,
            after_step=log if ranks.is_main_process else None,
            progress=progress,
        )
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        _publish(model.cpu().eval(), work, output, tokenizer, draw)
    return record


def _publish(model: Any, work: Path, output: Path, tokenizer: Any, draw: Drawing | None) -> None:
    with no_bars():
        model.save_pretrained(work)
        check(model, work)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    if draw is not None:
        draw([json.loads(line) for line in (work / METRICS).read_text().splitlines()], work)
    (work / RESUME).unlink(missing_ok=True)
    if output.exists():
        shutil.rmtree(output)
    work.replace(output)


def _told(recipe: Recipe, data: str, tokenizer: Any) -> str:
    """Everything that a run follows from, as ``recipe.json`` has it."""
    sizes = {"batch": recipe.batch, "length": recipe.length}
    told = {"model": dict(recipe.model), "train": asdict(recipe.options) | sizes, "schedule": list(recipe.schedule)}
    if data:
        told["data"] = data
    if tokenizer is not None:
        words = json.dumps(sorted(tokenizer.get_vocab().items()))
        told["tokenizer"] = hashlib.sha256(words.encode()).hexdigest()
    return json.dumps(told, indent=1) + "\n"


def _begin(work: Path, told: str) -> None:
    """Write down what is carried out here; OptionError where a run was interrupted that followed from something else.

    Without a state to go on from there is nothing to lose.
    """
    path = work / RECIPE
    if (work / RESUME).is_file() and not (path.is_file() and path.read_text(encoding="utf-8") == told):
        raise OptionError(
            f"{work} holds an unfinished run of another recipe, text or tokenizer: remove it or choose another folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(told, encoding="utf-8")


def _check_vocabulary(tokenizer: Any, size: int) -> None:
    needed = 0 if tokenizer is None else 1 + max(tokenizer.get_vocab().values())
    if needed > size:
        raise OptionError(f"the tokenizer has {needed} tokens: give [model] vocab_size={needed} or more, not {size}")


def _check_end(recipe: Recipe, model: Any) -> None:
    """OptionError where a model saved at the end of training would be another one when it is loaded: schedules leave
    values that are in no checkpoint, so [model] must say them."""
    if not recipe.schedule:
        return
    ended = deepcopy(model).eval()
    running = Training(ended, recipe)
    running.end()
    loaded = type(model)(model.config).eval()
    loaded.load_state_dict(ended.state_dict())
    left = "; ".join(f"{name} ends with {now}, [model] says {before}" for name, (now, before) in running.left().items())
    try:
        same = _same(ended, loaded)
    except (RuntimeError, IndexError) as error:  # it moved a size of what is already built
        said, _, _ = str(error).partition("\n")
        raise OptionError(f"a [[schedule]] leaves a model that cannot compute ({left}): {said}") from error
    if not same:
        raise OptionError(
            f"a [[schedule]] ends with other values than [model] says ({left}): give [model] the values that training "
            "ends with"
        )


def check(model: Any, folder: Path) -> None:
    """OutputError unless the folder holds the model that was trained."""
    if not _same(model, type(model).from_pretrained(folder, dtype=model.dtype).eval()):
        raise OutputError(f"{folder} does not hold the model that was trained: what it computes is not in its weights")


@torch.no_grad()
def _same(one: Any, other: Any) -> bool:
    ids = torch.arange(32)[None] % one.config.vocab_size
    return torch.allclose(other(ids).logits, one(ids).logits, rtol=1e-4, atol=1e-5)


def sharded(batches: Batches, rank: int, world: int) -> Batches:
    """A rank's rows of every batch: each ``world``-th. OptionError where there are too few for all."""

    def share(step: int) -> dict[str, torch.Tensor]:
        batch = batches(step)
        if (rows := len(batch["input_ids"])) < world:
            raise OptionError(
                f"{world} processes cannot share a batch of {rows} rows: give [train] batch={world} or more"
            )
        return {name: own[rank::world] for name, own in batch.items()}

    return share


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
            **running.unevenness(),
            "choices": sum(map(len, running.load)),
            "learning_rate": running.recipe.options.learning_rate * running.recipe.options.factor(step - 1),
            "load": [count.tolist() for count in running.load if len(count) <= LISTED],
            "seconds": round(time.perf_counter() - self.began, 3),
        }
        self.file.write(json.dumps(line) + "\n")
