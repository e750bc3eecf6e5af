"""Knowledge distillation: a student learns a teacher's next-token distributions, text, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.errors import OptionError
from moekit.train import losses
from moekit.train.balance import Balance
from moekit.train.loop import Record, train
from moekit.train.options import TrainOptions
from moekit.train.sequences import Batch, Batches, inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``kl`` * T^2 KL(teacher || student) + ``lm`` * cross-entropy + ``balance`` * sum over layers of E sum_e f_e P_e.

    Hinton et al. 2015 (arXiv 1503.02531) for the first, Switch Transformer (arXiv 2101.03961) for the last.
    """

    kl: float = 1.0
    temperature: float = 1.0
    lm: float = 0.0
    balance: float = 0.0

    def __post_init__(self) -> None:
        if min(self.kl, self.lm, self.balance) < 0 or self.kl + self.lm <= 0:
            raise OptionError(
                f"kl={self.kl:g}, lm={self.lm:g}, balance={self.balance:g}: no weight may be negative, and kl or lm "
                "must be positive"
            )
        if self.temperature <= 0:
            raise OptionError(f"temperature={self.temperature:g} must be above 0")


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Batches,
    options: TrainOptions,
    objective: Objective | None = None,
    *,
    what: Sequence[str] = ("all",),
    folder: str | Path | None = None,
    after_step: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Train ``student`` in place; the teacher is run for every batch and never changed.

    ``what`` chooses parameters (``groups.chosen``), ``folder`` keeps the run so that it can be taken up again
    (``loop.train``). Raises :class:`OptionError` for a KL term without a teacher, and as ``train`` does.
    """
    objective = objective or Objective()
    if objective.kl and teacher is None:
        raise OptionError("a KL term needs a teacher: give one, or an objective with kl=0")
    with ExitStack() as stack:
        balance = stack.enter_context(Balance(student)) if objective.balance else None
        mode = teacher.training if teacher is not None else False
        if teacher is not None:
            teacher.eval()
            stack.callback(teacher.train, mode)

        def loss(model: Any, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
            return _loss(model, teacher, batch, objective, balance)

        return train(
            student, loss, batches, options, what=what, folder=folder, after_step=after_step, progress=progress
        )


def _loss(
    model: Any, teacher: Any, batch: Batch, objective: Objective, balance: Balance | None
) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(**inputs(batch), use_cache=False).logits
    parts: dict[str, Tensor] = {}
    if objective.kl:
        with torch.no_grad():
            known = teacher(**inputs(batch), use_cache=False).logits
        parts["kl"] = losses.kl(logits, known, batch, objective.temperature)
    if objective.lm:
        parts["lm"] = losses.lm(logits, batch)
    if balance is not None:
        parts["balance"] = balance.take()
    weights = {"kl": objective.kl, "lm": objective.lm, "balance": objective.balance}
    total = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
    return total, parts
