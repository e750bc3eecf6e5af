"""Grouping experts: similarities, and joining each expert to the leader it is most like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cosine_of_gram(gram_EE: np.ndarray) -> np.ndarray:
    """Cosine similarities [E, E] of vectors known only by their inner products; zero against a zero vector."""
    norm_E = np.sqrt(np.clip(np.diag(gram_EE), 0.0, None))
    scale_EE = np.outer(norm_E, norm_E)
    return np.divide(gram_EE, scale_EE, out=np.zeros_like(gram_EE, dtype=float), where=scale_EE > 0)


def assign_to_leaders(similarity_EE: np.ndarray, leaders: Sequence[int]) -> np.ndarray:
    """For every expert the leader [E] it is most similar to; a leader is its own. Ties go to the earliest leader."""
    ids = np.asarray(sorted(leaders))
    chosen_E = ids[np.argmax(similarity_EE[:, ids], axis=1)]
    chosen_E[ids] = ids
    return chosen_E
