"""Generating from a fraction of the memory a model needs: experts are paged one by one from the model's own files."""

from moekit.run.answer import Cost, answer, prompt_ids
from moekit.run.paging import Paging, load, paging
from moekit.run.policy import CachePolicy, policies, policy
from moekit.run.predict import Predictor, Signal
from moekit.run.store import Counters, ExpertStore

__all__ = [
    "CachePolicy",
    "Cost",
    "Counters",
    "ExpertStore",
    "Paging",
    "Predictor",
    "Signal",
    "answer",
    "load",
    "paging",
    "policies",
    "policy",
    "prompt_ids",
]
