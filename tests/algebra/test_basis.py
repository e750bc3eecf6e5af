"""Shared bases: the error is the discarded singular values, sharing is found where it exists, whitening is optimal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.algebra import (
    low_rank,
    low_rank_parameters,
    second_moments,
    shared_columns,
    shared_columns_parameters,
    shared_rows,
    shared_rows_parameters,
)
from moekit.errors import OptionError


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def stacked(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(0, 1)


def side_by_side(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(weight), dim=1)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))


@settings(max_examples=40)
@given(shapes, st.data())
def test_errors_are_the_discarded_singular_values(shape, data) -> None:
    number, rows, columns, seed = shape
    weight = randn(number, rows, columns, seed=seed)
    for factorise, joined in ((shared_columns, side_by_side(weight)), (shared_rows, stacked(weight))):
        rank = data.draw(st.integers(1, min(joined.shape)))
        found = factorise(weight, rank)
        tail = torch.linalg.svdvals(joined)[rank:].square().sum()
        torch.testing.assert_close(found.discarded, tail, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close((found.weight() - weight).square().sum(), tail, atol=1e-9, rtol=1e-9)
    rank = data.draw(st.integers(1, min(rows, columns)))
    alone = low_rank(weight, rank)
    tail = torch.linalg.svdvals(weight)[:, rank:].square().sum(-1)
    torch.testing.assert_close(alone.discarded, tail, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close((alone.weight() - weight).square().sum((1, 2)), tail, atol=1e-9, rtol=1e-9)
    assert alone.num_parameters == low_rank_parameters(rows, columns, rank, number)


def test_factors_split_the_singular_values_evenly() -> None:
    for shape in ((5, 7), (7, 5)):
        weight = randn(*shape)
        found = low_rank(weight, 3)
        expected = torch.diag(torch.linalg.svdvals(weight)[:3])
        torch.testing.assert_close(found.left.T @ found.left, expected)
        torch.testing.assert_close(found.right @ found.right.T, expected)


@pytest.mark.parametrize("columns", [3, 8])
def test_untruncated_merge_is_the_weighted_mean(columns: int) -> None:
    weight = randn(3, 6, columns)
    share = torch.tensor([0.5, 2.0, 7.5])
    moments = torch.stack([second_moments(randn(20, columns, seed=seed)) for seed in range(3)])
    expected = torch.einsum("n,nrc->rc", share.double() / 10, weight)
    for given_moments in (None, moments):
        found = shared_columns(weight, None, given_moments)
        torch.testing.assert_close(found.mean(share), expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found.weight(), weight, atol=1e-12, rtol=1e-12)
    assert (shared_columns(weight, 1).mean(share) - expected).abs().max() > 1e-3


def test_shares_that_sum_to_zero_count_equally() -> None:
    weight = randn(3, 4, 5)
    torch.testing.assert_close(shared_columns(weight).mean(torch.zeros(3)), weight.mean(0))


@pytest.mark.parametrize("whitened", [False, True])
def test_a_planted_basis_is_recovered(whitened: bool) -> None:
    moments = second_moments(randn(40, 9, seed=5)) if whitened else None
    rows_shared = randn(4, 6, 3) @ randn(3, 9, seed=1)
    found = shared_rows(rows_shared, 3, moments)
    torch.testing.assert_close(found.weight(), rows_shared, atol=1e-10, rtol=1e-10)
    assert found.cores.shape == (4, 6, 3)
    assert shared_rows(rows_shared, 2, moments).discarded > 1e-3
    columns_shared = randn(6, 3) @ randn(4, 3, 9, seed=1)
    torch.testing.assert_close(shared_columns(columns_shared, 3, moments).weight(), columns_shared, atol=1e-10, rtol=0)
    assert shared_columns(columns_shared, 2, moments).discarded > 1e-3


def output_error(weight, found, moments) -> torch.Tensor:
    difference = found.weight() - weight
    return (difference @ moments * difference).sum()


@pytest.mark.parametrize("factorise", [low_rank, shared_columns, shared_rows])
def test_whitening_is_optimal_for_outputs(factorise) -> None:
    weight = randn(3, 7, 5)
    moments = second_moments(randn(30, 5, seed=3) * torch.tensor([10.0, 1.0, 1.0, 0.1, 0.1]))
    found = factorise(weight, 2, moments)
    error = output_error(weight, found, moments)
    torch.testing.assert_close(error, found.discarded.sum())
    assert error < 0.9 * output_error(weight, factorise(weight, 2), moments)
    root = torch.linalg.cholesky(moments)
    joined = {
        low_rank: list(weight @ root),
        shared_columns: [side_by_side(weight @ root)],
        shared_rows: [stacked(weight @ root)],
    }[factorise]
    torch.testing.assert_close(error, sum(torch.linalg.svdvals(m)[2:].square().sum() for m in joined))


@pytest.mark.parametrize("factorise", [low_rank, shared_columns, shared_rows])
def test_singular_moments_only_free_what_nobody_sees(factorise) -> None:
    weight = randn(2, 8, 5)
    x = randn(3, 5, seed=2)
    # Three tokens reach three input directions: rank 3 of each matrix, of the stack, and 6 of both side by side.
    found = factorise(weight, 6 if factorise is shared_columns else 3, second_moments(x))
    torch.testing.assert_close(found.weight() @ x.T, weight @ x.T, atol=1e-7, rtol=0)
    nothing = factorise(weight, 3, torch.zeros(5, 5))
    assert torch.isfinite(nothing.weight()).all()


def test_identity_moments_change_nothing() -> None:
    weight = randn(3, 6, 5)
    for factorise in (low_rank, shared_columns, shared_rows):
        plain, white = factorise(weight, 2), factorise(weight, 2, torch.eye(5))
        torch.testing.assert_close(plain.weight(), white.weight(), atol=1e-9, rtol=0)
    torch.testing.assert_close(shared_rows(weight, 2).basis, shared_rows(weight, 2, torch.eye(5)).basis)


def test_sharing_stores_less() -> None:
    weight = randn(4, 6, 5)
    assert shared_columns(weight, 2).num_parameters == shared_columns_parameters(6, 5, 2, 4) == 2 * 6 + 4 * 2 * 5
    assert shared_rows(weight, 2).num_parameters == shared_rows_parameters(6, 5, 2, 4) == 2 * 5 + 4 * 6 * 2
    assert low_rank(weight, 2).num_parameters == low_rank_parameters(6, 5, 2, 4) == 4 * 2 * 11


def test_zero_weights_are_no_trouble() -> None:
    for factorise in (low_rank, shared_columns, shared_rows):
        assert factorise(torch.zeros(2, 4, 3), 2, torch.eye(3)).weight().abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: low_rank(w, 5), r"rank 5 is not possible for a matrix \[6, 4\]: its full rank is 4, use 1 to 4"),
        (lambda w: low_rank(w, 0), "rank 0 is not possible"),
        (lambda w: shared_columns(w, 7), r"3 matrices \[6, 4\] side by side: its full rank is 6"),
        (lambda w: shared_rows(w, 5), r"3 stacked matrices \[6, 4\]: its full rank is 4"),
        (lambda w: shared_rows(w, 2, torch.eye(4).expand(3, 4, 4)), r"moments \[4, 4\] of all their inputs together"),
        (lambda w: shared_columns(w, 2, torch.eye(3)), r"need moments \[4, 4\] or one of these per matrix"),
        (lambda w: low_rank(w * float("nan"), 2), "NaN or infinite"),
        (lambda w: shared_rows(w, 2, torch.eye(4) * float("inf")), "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call(randn(3, 6, 4))
