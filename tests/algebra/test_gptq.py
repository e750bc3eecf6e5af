"""GPTQ: its limit cases are rounding to nearest, its error is below rounding's, and every fallback is named."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.algebra import Asymmetric, Symmetric, TernaryMinMax, gptq, round_to_nearest, second_moments
from moekit.algebra.grids import Affine
from moekit.algebra.moments import damped_factors, weighted_error
from moekit.errors import OptionError

GRIDS = [
    Asymmetric(bits=4, group_size=8),
    Asymmetric(bits=2, group_size=6),
    Asymmetric(bits=3, ratios=(1.0, 0.8)),
    Symmetric(bits=1, group_size=8),
    TernaryMinMax(),
]


def problem(experts: int = 3, rows: int = 5, columns: int = 20, tokens: int = 60, seed: int = 0, rank: int = 4):
    """Weights [E, R, C] and second moments [E, C, C] of strongly correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=draw) * 0.05
    mix = torch.randn(experts, rank, columns, generator=draw)
    x = torch.randn(experts, tokens, rank, generator=draw) @ mix
    x += 0.3 * torch.randn(experts, tokens, columns, generator=draw)
    return weight, torch.stack([second_moments(part) for part in x])


class Roomy:
    """128 steps to either side of zero, of which the largest weight needs four: nothing is clipped."""

    group_size = None

    def fit(self, weight: torch.Tensor) -> Affine:
        scales = (weight.abs().amax(-1, keepdim=True) / 4).bfloat16()
        return Affine(scales, scales * -128, 255)


def same(a, b) -> bool:
    parameters = all(torch.equal(t, b.parameters[name]) for name, t in a.parameters.items())
    return parameters and torch.equal(a.codes, b.codes) and torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("feedback", [(True, True), (True, False), (False, True)])
def test_without_correlation_it_is_rounding(grid, feedback) -> None:
    weight, _ = problem()
    columns, blocks = feedback
    variances = torch.diag(torch.rand(20) + 0.1)
    found, report = gptq(weight, variances, grid, block=7, column_feedback=columns, block_feedback=blocks)
    assert same(found, round_to_nearest(weight, grid))
    assert report.error == report.rounding_error
    assert report.fallbacks == {}


@pytest.mark.parametrize("grid", GRIDS)
def test_without_feedback_it_is_rounding(grid) -> None:
    weight, hessian = problem()
    found, report = gptq(weight, hessian, grid, column_feedback=False, block_feedback=False)
    assert same(found, round_to_nearest(weight, grid))
    assert report.error == report.rounding_error


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("feedback", [(True, True), (True, False), (False, True)])
def test_correlated_inputs_gain(grid, feedback) -> None:
    weight, hessian = problem(experts=6, rows=12)
    columns, blocks = feedback
    found, report = gptq(weight, hessian, grid, block=8, column_feedback=columns, block_feedback=blocks)
    plain = round_to_nearest(weight, grid)
    assert report.error == pytest.approx(weighted_error(weight - found.weight, hessian).tolist())
    assert report.rounding_error == pytest.approx(weighted_error(weight - plain.weight, hessian).tolist())
    assert sum(report.error) < 0.9 * sum(report.rounding_error)
    if columns and blocks:
        assert report.fallbacks == {}
        assert sum(report.error) < 0.6 * sum(report.rounding_error)


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_given_is_changed(rows: int) -> None:
    weight, hessian = problem(2, rows)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, Asymmetric(bits=2, group_size=8))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@settings(max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 3), st.sampled_from(GRIDS), st.booleans(), st.booleans()
)
def test_never_worse_than_rounding(seed, columns, rank, grid, column_feedback, block_feedback) -> None:
    weight, hessian = problem(2, 3, columns, 12, seed, rank)
    found, report = gptq(weight, hessian, grid, block=3, column_feedback=column_feedback, block_feedback=block_feedback)
    plain = weighted_error(weight - round_to_nearest(weight, grid).weight, hessian)
    assert (weighted_error(weight - found.weight, hessian) <= plain).all()
    assert all(error <= rounding for error, rounding in zip(report.error, report.rounding_error, strict=True))


def test_a_worse_outcome_is_replaced_and_named() -> None:
    outcomes = [gptq(*problem(1, 1, 4, 12, seed, 2), Asymmetric(bits=2))[1] for seed in range(200)]
    named = [report for report in outcomes if report.fallbacks]
    assert named, "of 200 tiny problems at 2 bits some must fall back"
    assert all(r.fallbacks == {0: "feedback was worse than rounding to nearest"} for r in named)
    assert all(r.error == r.rounding_error for r in named)


def test_the_optimum_is_not_beaten_and_near() -> None:
    ratios = []
    for seed in range(30):
        weight, hessian = problem(1, 1, 4, 30, seed, 2)
        grid = Asymmetric(bits=2)
        _, report = gptq(weight, hessian, grid, damping=1e-6)
        points = grid.fit(weight)
        codes = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)[:, None]
        optimum = float(weighted_error(weight - points.decode(codes), hessian).min())
        assert report.error[0] >= optimum * (1 - 1e-5)
        ratios.append(report.error[0] / optimum)
    assert max(ratios) > 1.01
    assert sum(ratios) / len(ratios) < 3
    assert sorted(ratios)[15] < 1.5


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_nearest_plane_bound(seed: int, columns: int) -> None:
    """Where nothing is clipped, the error is at most sum_j (scale / 2)^2 R_jj^2 per row."""
    weight, hessian = problem(2, 3, columns, 40, seed, 2)
    weight, hessian = weight.double(), hessian.double()
    found, report = gptq(weight, hessian, Roomy(), damping=0.0)
    factor, _, worked = damped_factors(hessian, 0.0)
    assert worked.all()
    assert ((found.codes > 0) & (found.codes < 255)).all()
    half = found.parameters["scales"].double()[..., 0] / 2
    bound = (half**2).sum(-1) * (factor.diagonal(dim1=1, dim2=2) ** 2).sum(-1)
    assert all(error <= float(limit) * (1 + 1e-6) for error, limit in zip(report.error, bound, strict=True))


def test_feedback_between_blocks_is_the_exact_compensation() -> None:
    """Left unrounded, the later columns take the least squares answer to the first block's error."""
    weight, hessian = problem(1, 3, 6, 40)
    weight, hessian = weight.double(), hessian.double()
    grid = Asymmetric(bits=2, group_size=3)
    first = round_to_nearest(weight[..., :3], grid).weight
    rest = weight[0, :, 3:] + (weight[0, :, :3] - first[0]) @ hessian[0, :3, 3:] @ hessian[0, 3:, 3:].inverse()
    points = grid.fit(rest)
    found, report = gptq(weight, hessian, grid, damping=0.0, block=3, column_feedback=False)
    assert report.fallbacks == {}
    assert torch.equal(found.codes[0, :, 3:], points.encode(rest))
    assert torch.equal(found.parameters["mins"][0, :, 1], points.parameters()["mins"])


def test_blocks_only_set_the_pace() -> None:
    weight, hessian = problem(2, 4, 24)
    weight, hessian = weight.double(), hessian.double()
    results = [gptq(weight, hessian, Asymmetric(bits=4, group_size=10), block=block)[0] for block in (1, 7, 24, 100)]
    assert all(same(results[0], other) for other in results[1:])


def textbook(weight: torch.Tensor, hessian: torch.Tensor, grid: Asymmetric, damping: float) -> torch.Tensor:
    """Codes of one matrix as the paper's pseudo-code makes them: the whole inverse, an update after every column."""
    columns = weight.shape[1]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    upper = torch.linalg.cholesky(damped.inverse(), upper=True)
    work, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for at in range(columns):
        if at % grid.group_size == 0:
            points = grid.fit(work[:, at : at + grid.group_size])
        codes[:, at : at + 1] = points.encode(work[:, at : at + 1])
        error = (work[:, at] - points.decode(codes[:, at : at + 1])[:, 0]) / upper[at, at]
        work[:, at:] -= error[:, None] * upper[at, at:]
    return codes


@pytest.mark.parametrize("columns", [70, 150])
@pytest.mark.parametrize("group_size", [10, 64])
def test_it_is_the_textbook_without_the_inverse(columns: int, group_size: int) -> None:
    weight, hessian = (part.double() for part in problem(2, 6, columns, 300, rank=9))
    grid = Asymmetric(bits=4, group_size=group_size)
    found, report = gptq(weight, hessian, grid, damping=0.01)
    assert report.fallbacks == {}
    for expert in range(2):
        assert torch.equal(found.codes[expert], textbook(weight[expert], hessian[expert], grid, 0.01))


def test_single_precision_rounds_almost_as_double_does() -> None:
    weight, hessian = problem(2, 16, 150, 40, rank=9)
    grid = Asymmetric(bits=4, group_size=64)
    single, double = gptq(weight, hessian, grid)[0], gptq(weight.double(), hessian.double(), grid)[0]
    assert (single.codes != double.codes).float().mean() < 0.01


@pytest.mark.parametrize("columns", [3, 512, 1100])
def test_the_weighted_error_is_the_trace(columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    difference = torch.randn(2, 3, columns, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 20, columns, generator=draw, dtype=torch.float64)
    moments = x.mT @ x
    expected = (difference @ moments @ difference.mT).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(weighted_error(difference, moments), expected)
    assert weighted_error(difference, -moments).tolist() == [0.0, 0.0]


def test_unit_token_weights_change_nothing() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(second_moments(x, torch.ones(50)), second_moments(x))
    torch.testing.assert_close(second_moments(x, torch.full((50,), 2.0)), 2 * second_moments(x))
    assert torch.equal(second_moments(x[:0]), torch.zeros(7, 7))


def test_token_weights_enter_once_and_lower_the_weighted_error() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 16, 24, generator=draw) * 0.05
    x = torch.randn(300, 24, generator=draw)
    x[:150] @= torch.randn(24, 24, generator=draw)
    importance = torch.cat([torch.full((150,), 0.02), torch.full((150,), 2.0)])
    loss = {}
    for name, counted in (("plain", None), ("weighted", importance)):
        found, _ = gptq(weight, second_moments(x, counted), Asymmetric(bits=3, group_size=8))
        change = x @ (weight[0] - found.weight[0]).T
        loss[name] = float((importance[:, None] * change**2).sum())
    assert loss["weighted"] < 0.9 * loss["plain"]


def test_every_fallback_is_named_and_spares_the_others() -> None:
    weight, hessian = problem(5)
    broken = hessian.clone()
    broken[1] = 0
    broken[2, 0, 0] = float("nan")
    broken[3] = -hessian[3]
    grid = Asymmetric(bits=3, group_size=8)
    found, report = gptq(weight, broken, grid)
    assert report.fallbacks == {
        1: "it got no inputs",
        2: "the second moments of its inputs are not finite",
        3: "the second moments of its inputs are not positive definite",
    }
    plain, whole = round_to_nearest(weight, grid), gptq(weight, hessian, grid)[0]
    for expert, reference in enumerate([whole, plain, plain, plain, whole]):
        assert torch.equal(found.codes[expert], reference.codes[expert])
        assert torch.equal(found.weight[expert], reference.weight[expert])
        assert torch.equal(found.parameters["scales"][expert], reference.parameters["scales"][expert])
    assert torch.isfinite(torch.tensor(report.error)).all()


def test_singular_moments_get_more_damping() -> None:
    weight, _ = problem(1, 4, 20)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, report = gptq(weight, second_moments(x), Asymmetric(bits=3, group_size=10), damping=0.0)
    assert report.damping[0] >= 1e-6
    assert report.fallbacks == {}
    assert report.error[0] < report.rounding_error[0]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_dead_column_is_rounded_and_counted(damping: float) -> None:
    weight, hessian = problem(2, 4, 12, 200)
    alive = [j for j in range(12) if j != 5]
    hessian[0, 5] = hessian[0, :, 5] = 0
    grid = Asymmetric(bits=8, group_size=1)
    found, report = gptq(weight, hessian, grid, damping=damping)
    assert report.dead_columns == (1, 0)
    assert torch.equal(found.weight[0, :, 5], round_to_nearest(weight, grid).weight[0, :, 5])
    mean = damping * hessian[0].diagonal().mean() * (1 / hessian[0][alive][:, alive].diagonal().mean())
    alone, _ = gptq(weight[0][:, alive], hessian[0][alive][:, alive], grid, damping=float(mean))
    torch.testing.assert_close(found.weight[0][:, alive], alone.weight, atol=1e-3, rtol=1e-2)


def test_how_many_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(5)
    hessian[3] = 0
    grid = Asymmetric(bits=3, group_size=8)
    together, report = gptq(weight, hessian, grid)
    monkeypatch.setattr(sys.modules["moekit.algebra.gptq"], "WORK_BYTES", 1)
    apart, other = gptq(weight, hessian, grid)
    assert same(together, apart)
    assert report.fallbacks == other.fallbacks == {3: "it got no inputs"}
    assert report.error == pytest.approx(other.error)


def test_one_matrix_and_shared_moments() -> None:
    weight, hessian = problem(2)
    grid = Asymmetric(bits=3, group_size=8)
    shared, _ = gptq(weight, hessian[0], grid)
    single, _ = gptq(weight[1], hessian[0], grid)
    assert torch.equal(shared.codes[1], single.codes)
    assert single.codes.shape == (5, 20)
    assert single.parameters["scales"].shape == (5, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(3)}, r"need second moments \[3, 20, 20\] or \[20, 20\], got \[1, 3, 3\]"),
        ({"damping": -0.1}, "damping=-0.1 must be at least 0"),
        ({"damping": float("nan")}, "damping=nan must be at least 0"),
        ({"block": 0}, "block=0 must be at least 1"),
        ({"weight": torch.full((3, 5, 20), float("nan"))}, "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(change, message: str) -> None:
    weight, hessian = problem()
    options = {"weight": weight, "hessian": hessian, "grid": Asymmetric(bits=4)} | change
    with pytest.raises(OptionError, match=message):
        gptq(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"need inputs \[T, C\], got \[3\]"),
        ((torch.ones(3, 2), torch.ones(2)), r"shape \[2\], but there are 3 tokens"),
        ((torch.ones(3, 2), -torch.ones(3)), "finite and at least 0"),
        ((torch.ones(3, 2), torch.full((3,), float("nan"))), "finite and at least 0"),
    ],
)
def test_bad_moments_are_refused(arguments, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        second_moments(*arguments)
