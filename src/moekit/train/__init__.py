"""Training on transformers' Trainer: distillation, preference, structured forms of experts, recovery."""

from typing import Any

from moekit.train.distil import Objective, distil
from moekit.train.groups import ROLES, chosen, train_only
from moekit.train.loop import Record, train
from moekit.train.options import TrainOptions
from moekit.train.preference import Preference, pair_batches, prefer, read_pairs
from moekit.train.recover import Recovery, recover
from moekit.train.sequences import Batch, Batches, batches_of, padded, token_rows

__all__ = [
    "ROLES",
    "Batch",
    "Batches",
    "FinishStep",
    "Objective",
    "Preference",
    "Record",
    "Recovery",
    "TrainOptions",
    "batches_of",
    "chosen",
    "distil",
    "padded",
    "pair_batches",
    "prefer",
    "read_pairs",
    "recover",
    "token_rows",
    "train",
    "train_only",
]


def __getattr__(name: str) -> Any:
    """``FinishStep`` when first asked for: its base is part of transformers' Trainer, which takes long to load."""
    if name == "FinishStep":
        from moekit.train.callback import FinishStep

        return FinishStep
    raise AttributeError(f"module 'moekit.train' has no attribute {name!r}")
