"""Token sequences as training batches: a batch is a function of its step, so that any run can be taken up again.

Shapes by suffix: B sequences, S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from moekit.errors import TextError
from moekit.measure import windows

T = TypeVar("T")
Batch = Mapping[str, Tensor]
"""``input_ids`` [B, S], ``attention_mask`` [B, S] where padded, and ``weight`` [B, S-1], the weight of the loss of
predicting token s+1 at s, where not all count alike. Weights are shifted already: nothing shifts them again."""
Batches = Callable[[int], Batch]
"""The batch of a step."""


def batches_of(rows: Sequence[Any], size: int, seed: int = 0) -> Batches:
    """Batches of ``size`` rows, each a sequence of token ids; every row once before any comes again, in a drawn order.

    Raises:
        TextError: no row of at least two tokens.
    """
    kept = [torch.as_tensor(np.asarray(row), dtype=torch.int64) for row in rows if len(row) > 1]
    if not kept:
        raise TextError("there is nothing to train on: give token sequences of at least two tokens")
    drawn = dealt(kept, size, seed)
    return lambda step: padded(drawn(step))


def dealt(items: Sequence[T], size: int, seed: int = 0) -> Callable[[int], list[T]]:
    """The ``size`` items of a step: every one once before any comes again (but for those that fill no batch), in an
    order drawn anew for each pass."""
    count = min(size, len(items))
    per_pass = len(items) // count

    def drawn(step: int) -> list[T]:
        turn, place = divmod(step, per_pass)
        order = np.random.default_rng((seed, turn)).permutation(len(items))
        return [items[i] for i in order[place * count : (place + 1) * count]]

    return drawn


def padded(rows: Sequence[Tensor]) -> Batch:
    """Right-padded rows with their mask."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def token_rows(texts: Mapping[str, Iterable[str]], tokenizer: Any, length: int) -> list[Tensor]:
    """Texts of all domains as rows of at most ``length`` tokens, one domain after the other.

    Raises:
        TextError: a domain with nothing to predict.
    """
    rows: list[Tensor] = []
    for name, lines in texts.items():
        cut = windows(lines, tokenizer, length=length, batch_size=1, what=f"domain {name!r}")
        rows += [batch["input_ids"][0] for batch in cut.batches]
    return rows


def fingerprint(rows: Sequence[Tensor]) -> str:
    """What tells token rows apart from others: sha256 of their lengths and ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What a model takes of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """(ids [B, S-1] to be predicted, weights [B, S-1] of predicting them; padding weighs nothing)."""
    ids = batch["input_ids"]
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    both = (real[:, 1:] & real[:, :-1]).to(torch.float32)
    return ids[:, 1:], both * batch["weight"] if "weight" in batch else both
