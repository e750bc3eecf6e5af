"""Short distillation after compression: the output learns from its source what it lost.

Always offered, and always reported apart from what compression did without training: ``before`` and ``after`` are
measured on rows that were kept aside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import OptionError, OutputError, TextError
from moekit.measure import compare
from moekit.stream import LoadedModel
from moekit.train import recovered
from moekit.train.distil import Objective, distil
from moekit.train.forms import Scaled, Tied
from moekit.train.loop import Record, training_device
from moekit.train.options import TrainOptions
from moekit.train.parametrise import parametrise, settle
from moekit.train.sequences import batches_of, padded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

WHAT = ("router", "norms", "scales", "experts", "shared", "rewrite")
"""``scales``: a factor per row of every expert matrix, the weights below it as they are. ``rewrite``: what changes the
routing at run time, such as the vectors that stand in for experts that do not run."""
_EVERY = 8
"""One row of so many is kept aside to measure on."""


@dataclass(frozen=True)
class Recovery:
    """``model`` is the recovered one, in memory; ``before`` and ``after`` its divergence from the source."""

    model: PreTrainedModel
    record: Record
    before: dict[str, Any]
    after: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What to report."""
        last = self.record.last()
        return {"steps": len(self.record.losses), "training": last, "before": self.before, "after": self.after}


def recover(
    compressed: str | os.PathLike[str] | Checkpoint,
    against: str | os.PathLike[str] | Checkpoint,
    rows: Sequence[Tensor],
    output: str | os.PathLike[str] | None = None,
    *,
    what: Sequence[str] = ("router",),
    options: TrainOptions | None = None,
    objective: Objective | None = None,
    batch_size: int = 8,
    device: str = "auto",
    overwrite: bool = False,
    check: Callable[[Path], dict[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """Train the chosen parts of a compressed model towards its source, and write a new folder where asked to.

    Args:
        rows: token ids of text; every eighth row is only measured on.
        what: of :data:`WHAT`. Where experts are stored packed, routers, norms and shared experts are trained around
            them and everything else is copied byte for byte; training packed experts stores them decoded, in moekit's
            own format where something changes the routing at run time.
        device: where both models are held and run.
        check: run on the finished folder before it gets its name, such as a reload in another process; its answer goes
            into ``recovery.json``.

    Raises:
        OptionError: unknown parts or device, models that do not belong together, or a result no format can hold.
        TextError: fewer than two rows. OutputError: the output exists or cannot be written.
    """
    wrong = [part for part in what if part not in WHAT]
    if wrong or not what:
        raise OptionError(f"cannot train {wrong[0] if wrong else 'nothing'}: choose of {', '.join(WHAT)}")
    if output is not None and Path(output).exists() and not overwrite:
        raise OutputError(f"{output} exists; pass --overwrite to replace it, or choose another output")
    student, source = _opened(compressed), _opened(against)
    recovered.check_possible(student, what)
    place = training_device(device)
    kept, aside = [row for i, row in enumerate(rows) if i % _EVERY], list(rows[::_EVERY])
    if not kept:
        raise TextError(f"{len(rows)} row of text is too little to train and to measure on: give more text")
    model, slots = recovered.trainable(student, place)
    teacher = LoadedModel.load(source, device=place, dtype=torch.float32).model
    if model.config.get_text_config().vocab_size != teacher.config.get_text_config().vocab_size:
        raise OptionError(
            f"{student.path} and {source.path} have different vocabularies: give the model it was made from"
        )
    before = _divergence(teacher, model, aside)
    with _forms(model, what, slots):
        roles = list(dict.fromkeys("experts" if part == "scales" else part for part in what))
        batches = batches_of(kept, batch_size, (options or TrainOptions()).seed)
        record = distil(model, teacher, batches, options or TrainOptions(), objective, what=roles, progress=progress)
    done = Recovery(model.eval(), record, before, _divergence(teacher, model, aside))
    if output is not None:
        report = {**done.as_dict(), "trained": list(what), "source": source.fingerprint, "of": student.fingerprint}
        report["options"] = asdict(options or TrainOptions())
        recovered.write(model, student, Path(output), what, report, overwrite=overwrite, check=check)
    return done


def _opened(ref: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    return ref if isinstance(ref, Checkpoint) else Checkpoint.open(ref)


@contextmanager
def _forms(model: PreTrainedModel, what: Sequence[str], slots: dict[str, list[int]]) -> Iterator[None]:
    """Experts as factors where only scales are trained, and as one where several rows share one."""
    if "scales" in what and "experts" in what:
        raise OptionError("scales are trained with the weights below them as they are: choose scales or experts")
    found = blocks(model)
    for block in found:
        shared = slots.get(block.name, [])
        if "scales" in what:
            parametrise(block, Scaled)
        elif "experts" in what and len(set(shared)) < len(shared):
            used = sorted(set(shared))
            parametrise(block, lambda shared=shared, used=used: Tied([used.index(slot) for slot in shared]))  # type: ignore[misc]
    try:
        yield
    finally:
        for block in found:
            if "scales" in what or "experts" in what:
                settle(block)


def _divergence(teacher: PreTrainedModel, model: PreTrainedModel, rows: Sequence[Tensor]) -> dict[str, Any]:
    batches = [dict(padded(list(rows[i : i + 8]))) for i in range(0, len(rows), 8)]
    found = compare(LoadedModel(teacher), LoadedModel(model), batches).as_dict()
    return {name: value for name, value in found.items() if value is not None}
