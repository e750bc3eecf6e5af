"""Compression methods, one file per paper; every one of them only makes a plan."""

from moekit.compress._arena import Arena
from moekit.compress._compare import Comparison, compare
from moekit.compress._finish import calibratable, calibrated, finishes
from moekit.compress._fitness import read_examples, task_error
from moekit.compress._options import method, methods, sequence
from moekit.compress._own_texts import OwnTexts
from moekit.compress._search import searching
from moekit.compress._within import chain, within

__all__ = [
    "Arena",
    "Comparison",
    "OwnTexts",
    "calibratable",
    "calibrated",
    "chain",
    "compare",
    "finishes",
    "method",
    "methods",
    "read_examples",
    "searching",
    "sequence",
    "task_error",
    "within",
]
