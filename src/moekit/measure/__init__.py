"""Measuring a model: bits per byte, divergence from a reference, exact-match scores, each with its interval."""

from moekit.measure._interval import Interval
from moekit.measure._runner import Runner
from moekit.measure._text import LENGTH, Windows, pad_batches, together, windows
from moekit.measure.bits import bits_per_byte
from moekit.measure.divergence import Divergence, compare
from moekit.measure.tasks import exact_match

__all__ = [
    "LENGTH",
    "Divergence",
    "Interval",
    "Runner",
    "Windows",
    "bits_per_byte",
    "compare",
    "exact_match",
    "pad_batches",
    "together",
    "windows",
]
