"""Training on transformers' Trainer: distillation, preference, structured forms of experts, recovery."""

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
    "padded",
    "pair_batches",
    "prefer",
    "token_rows",
    "train",
    "train_only",
]
