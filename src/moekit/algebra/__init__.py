"""Mechanisms on expert weights and scores that several wings share; no paper's name in here."""

from moekit.algebra.align import align, alignment
from moekit.algebra.allocate import Allocation, allocate, frontiers
from moekit.algebra.cluster import assign_to_leaders, cosine_of_gram
from moekit.algebra.rank import best, share_to_count

__all__ = [
    "Allocation",
    "align",
    "alignment",
    "allocate",
    "assign_to_leaders",
    "best",
    "cosine_of_gram",
    "frontiers",
    "share_to_count",
]
