"""Ranking and grouping: deterministic, protective, even across groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.algebra import assign_to_leaders, best, cosine_of_gram, share_to_count
from moekit.errors import OptionError

scores = st.lists(st.integers(0, 3), min_size=8, max_size=8).map(lambda s: np.array(s, float))


def test_ties_go_to_the_lower_id_and_nan_to_the_end() -> None:
    assert best(np.array([1, 2, 2, 1, np.nan]), 3) == (0, 1, 2)
    assert best(np.array([np.nan, -5.0]), 1) == (1,)


@given(scores, st.integers(1, 8))
def test_nothing_left_out_beats_what_is_kept(score_E, count) -> None:
    kept = best(score_E, count)
    left = [score_E[e] for e in range(8) if e not in kept]
    assert len(kept) == count
    assert not left or max(left) <= min(score_E[list(kept)])


@given(scores, st.integers(1, 8), st.sets(st.integers(0, 7), max_size=2))
def test_protected_first_and_groups_even(score_E, count, protected) -> None:
    kept = best(score_E, count, num_groups=2)
    assert sum(e < 4 for e in kept) == sum(e >= 4 for e in kept) == -(-count // 2)
    guarded = best(score_E, max(count, len(protected)), protected=protected)
    assert protected <= set(guarded)


def test_shares_round_up_and_numbers_stay() -> None:
    assert [share_to_count(s, 10) for s in (0.5, 0.25, 1.0, 0.01, 7)] == [5, 3, 10, 1, 7]
    assert share_to_count(0.1 + 0.2, 10) == 3


def test_experts_join_the_leader_they_resemble() -> None:
    vectors = np.array([[1.0, 0], [0, 1], [2, 0.1], [0.1, 3], [0, 0]])
    similarity = cosine_of_gram(vectors @ vectors.T)
    np.testing.assert_allclose(similarity[:4, :4].diagonal(), 1)
    assert similarity[4].tolist() == [0] * 5
    assert assign_to_leaders(similarity, [1, 0]).tolist() == [0, 1, 0, 1, 0]
    assert assign_to_leaders(np.ones((3, 3)), [0, 2]).tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("at", "value"), [((0, 0), np.nan), ((0, 0), -np.inf), ((1, 2), np.nan), ((1, 2), np.inf), ((1, 2), -np.inf)]
)
def test_similarities_that_cannot_be_told_are_refused(at: tuple[int, int], value: float) -> None:
    gram = np.eye(3)
    gram[at] = value
    with pytest.raises(OptionError, match="inner products of router logits of layer 7 hold NaN or infinite values"):
        cosine_of_gram(gram, "router logits of layer 7")


def test_an_expert_that_is_masked_is_like_no_other() -> None:
    logits = np.array([[1.0, -np.inf, 2.0], [0.5, -np.inf, -1.0], [0.3, -np.inf, 0.2]])
    with np.errstate(invalid="ignore"):
        similar = cosine_of_gram(logits.T @ logits)
    assert similar[1].tolist() == similar[:, 1].tolist() == [0, 0, 0]
    apart = np.delete(logits, 1, axis=1)
    np.testing.assert_allclose(np.delete(np.delete(similar, 1, 0), 1, 1), cosine_of_gram(apart.T @ apart))
