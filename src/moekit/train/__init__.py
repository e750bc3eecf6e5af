"""Training: distillation, preference, structured forms of experts, recovery after compression; on transformers' Trainer."""

from moekit.train.distil import Objective, distil
from moekit.train.groups import ROLES, chosen, train_only
from moekit.train.loop import Record, train
from moekit.train.options import TrainOptions
from moekit.train.preference import Preference, pair_batches, prefer
from moekit.train.sequences import Batch, Batches, batches_of, padded, token_rows

__all__ = [
    "ROLES",
    "Batch",
    "Batches",
    "Objective",
    "Preference",
    "Record",
    "TrainOptions",
    "batches_of",
    "chosen",
    "distil",
    "pair_batches",
    "padded",
    "prefer",
    "token_rows",
    "train",
    "train_only",
]
