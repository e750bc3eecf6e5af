"""Preference distillation: a student learns which of two continuations is better, measured against a reference model.

LLaVA-MoD (arXiv 2408.15881) takes the teacher as the reference; any model, a frozen copy of the student too, will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from moekit.errors import OptionError, TextError
from moekit.measure.records import read_records
from moekit.train import losses
from moekit.train.balance import Balance
from moekit.train.loop import Record, train
from moekit.train.options import TrainOptions
from moekit.train.sequences import Batch, Batches, dealt, inputs, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["dpo", "kto_pair"]
Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Token ids of a prompt, of the better and of the worse continuation."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """``kind``: sigmoid DPO, or KTO on pairs; ``beta`` its temperature; ``balance`` as in ``distil.Objective``."""

    kind: Kind = "dpo"
    beta: float = 0.1
    balance: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise OptionError(f"kind={self.kind!r}: choose one of {', '.join(get_args(Kind))}")
        if self.beta <= 0 or self.balance < 0:
            raise OptionError(f"beta={self.beta:g} must be above 0, balance={self.balance:g} not below")


def pair_batches(pairs: Sequence[Pair], size: int, seed: int = 0) -> Batches:
    """Batches of ``size`` pairs: the better continuations in the first half of the rows, the worse in the second.

    Only the continuation counts: the weight of predicting it is 1 from the prompt's last token on. TextError for no
    pair, or an empty prompt or continuation.
    """
    if not pairs or any(not len(part) for pair in pairs for part in pair):
        raise TextError("preference pairs need a prompt and two continuations, none of them empty")
    drawn = dealt(pairs, size, seed)
    return lambda step: pair_batch(drawn(step))


def read_pairs(path: str | Path, tokenizer: Any) -> list[Pair]:
    """Pairs from a JSONL file, an object with "prompt", "chosen" and "rejected" a line, as token ids.

    Raises:
        TextError: a file that is missing, empty, not JSON, or a line that lacks one of the three.
    """
    found = read_records(path, ("prompt", "chosen", "rejected"))
    ids = ([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for texts in found)
    return [(prompt, better, worse) for prompt, better, worse in ids]


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """Rows of all better continuations, then of all worse, with the weights of what is to be predicted."""
    sides = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
    made = dict(padded([torch.tensor([*prompt, *answer]) for prompt, answer in sides]))
    weight = torch.zeros(made["input_ids"].shape[0], made["input_ids"].shape[1] - 1)
    for row, (prompt, answer) in enumerate(sides):
        weight[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = 1
    return {**made, "weight": weight}


def halves(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the better and of the worse continuations, [B] each."""
    found = losses.log_probability(model(**inputs(batch), use_cache=False).logits, batch)
    better, worse = found.chunk(2)
    return better, worse


def prefer(
    student: PreTrainedModel,
    reference: PreTrainedModel,
    batches: Batches,
    options: TrainOptions,
    objective: Preference | None = None,
    *,
    what: Sequence[str] = ("all",),
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Train ``student`` in place on pairs (:func:`pair_batches`), against a reference that is never changed.

    The record's "accuracy" is the share of pairs whose margin over the reference is positive, "margin" its mean.
    Raises OptionError where student and reference are one model, and as ``train`` does.
    """
    objective = objective or Preference()
    if reference is student:
        raise OptionError("the reference is the student itself, whose margin is always 0: give the teacher, or a copy")
    mode = reference.training
    reference.eval()
    balance = Balance(student) if objective.balance else None

    def loss(model: Any, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        with torch.no_grad():
            known = halves(reference, batch)
        policy = halves(model, batch)
        kind = losses.dpo if objective.kind == "dpo" else losses.kto_pair
        gain = losses.margin(policy, known).detach()
        parts = {"preference": kind(policy, known, objective.beta)}
        total = parts["preference"]
        if balance is not None:
            parts["balance"] = balance.take()
            total = total + objective.balance * parts["balance"]
        return total, {**parts, "margin": gain.mean(), "accuracy": (gain > 0).float().mean()}

    try:
        if balance is None:
            return train(student, loss, batches, options, what=what, progress=progress)
        with balance:
            return train(student, loss, batches, options, what=what, progress=progress)
    finally:
        reference.train(mode)
