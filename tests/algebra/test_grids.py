"""Grids: the packed bank's own storage, closed forms, nearest points, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.algebra import Asymmetric, Symmetric, TernaryAbsmean, TernaryMinMax, round_to_nearest
from moekit.errors import OptionError
from moekit.formats import _grid

EVERY = [
    *(Asymmetric(bits=bits, group_size=5) for bits in (1, 2, 3, 4, 8)),
    *(Symmetric(bits=bits, group_size=5) for bits in (1, 2, 3, 4, 8)),
    Asymmetric(bits=3, ratios=(1.0, 0.8, 0.6)),
    TernaryMinMax(),
    TernaryAbsmean(),
    TernaryAbsmean(group_size=5),
]


def weights(rows: int = 6, columns: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [1, 4, 5, 16, 17, 64])
def test_asymmetric_is_the_packed_bank_bit_for_bit(bits: int, group_size: int) -> None:
    weight = weights() + 0.01
    found = round_to_nearest(weight, Asymmetric(bits=bits, group_size=group_size))
    integers, scales, mins = _grid.fit(weight, bits, group_size)
    assert torch.equal(found.codes, integers)
    assert torch.equal(found.parameters["scales"], scales)
    assert torch.equal(found.parameters["mins"], mins)
    assert torch.equal(found.weight, _grid.decode(integers, scales, mins, group_size, torch.float32))


@pytest.mark.parametrize("grid", [g for g in EVERY if isinstance(g, Asymmetric | Symmetric)])
def test_affine_results_pack_without_loss(grid) -> None:
    found = round_to_nearest(weights(), grid)
    packed = _grid.pack(found.codes, grid.bits)
    scales, mins = (found.parameters[name] for name in ("scales", "mins"))
    codes = _grid.unpack(packed, grid.bits, 17)
    assert torch.equal(_grid.decode(codes, scales, mins, grid.group_size or 17, torch.float32), found.weight)


@pytest.mark.parametrize("grid", EVERY)
def test_no_other_code_is_nearer(grid) -> None:
    weight = weights(4, 5)
    points = grid.fit(weight)
    near = (points.decode(points.encode(weight)) - weight).abs()
    count = {"Ternary": 3, "Signs": 2}.get(type(points).__name__) or points.levels + 1
    for code in range(count):
        other = (points.decode(torch.full_like(weight, code, dtype=torch.uint8)) - weight).abs()
        assert (near <= other + 1e-9).all()


@pytest.mark.parametrize("grid", EVERY)
def test_experts_are_rounded_as_if_alone(grid) -> None:
    stack = torch.stack([weights(seed=0), weights(seed=1) * 30])
    together = round_to_nearest(stack, grid)
    for expert in range(2):
        alone = round_to_nearest(stack[expert], grid)
        assert torch.equal(together.codes[expert], alone.codes)
        assert torch.equal(together.weight[expert], alone.weight)
        assert all(torch.equal(together.parameters[name][expert], t) for name, t in alone.parameters.items())


@pytest.mark.parametrize("grid", EVERY)
@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_constant_weights_survive(grid, constant: float) -> None:
    found = round_to_nearest(torch.full((2, 7), constant), grid)
    atol = 0.5 / 128
    if isinstance(grid, Symmetric) and grid.bits > 1 and constant:
        atol += float(found.parameters["scales"].max()) / 2  # its largest point is half a step below the largest weight
    assert torch.allclose(found.weight, torch.full((2, 7), constant), atol=atol, rtol=0)


def test_one_bit_is_sign_times_mean() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0, 0.5, -0.5]])
    found = round_to_nearest(weight, Symmetric(bits=1, group_size=4))
    assert found.weight.tolist() == [[2.5, -2.5, 2.5, -2.5, 0.5, -0.5]]
    assert found.codes.tolist() == [[1, 0, 1, 0, 1, 0]]
    tiny = torch.tensor([[1.0, 1e-12, 0.0, -1e-12]])
    assert round_to_nearest(tiny, Symmetric(bits=1)).codes.tolist() == [[1, 1, 1, 0]]


def test_symmetric_closed_form() -> None:
    weight = torch.tensor([[-15.0, 0.0, 1.0, 2.9, 15.0]])
    found = round_to_nearest(weight, Symmetric(bits=4))
    assert found.parameters["scales"].tolist() == [[2.0]]
    assert found.codes.tolist() == [[0, 8, 8, 9, 15]]
    assert found.weight.tolist() == [[-16.0, 0.0, 0.0, 2.0, 14.0]]


def test_ternary_min_max_closed_form() -> None:
    weight = torch.tensor([[-2.0, -1.1, -0.9, 0.0, 1.9, 2.1, 4.0], [0.0, 0.5, 1.0, 1.1, 2.0, 0.1, 0.2]])
    found = round_to_nearest(weight, TernaryMinMax())
    assert found.weight.tolist() == [[-2.0, -2.0, 0.0, 0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0]]
    assert found.codes.tolist() == [[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 1, 1]]


def test_zeros_have_one_code_even_without_a_negative_point() -> None:
    points = TernaryMinMax().fit(torch.tensor([[0.5, 1.0]]))
    assert points.encode(torch.tensor([[-0.3, 0.0, 0.4, 0.6]])).tolist() == [[1, 1, 1, 2]]
    points = TernaryMinMax().fit(torch.tensor([[-0.5, -1.0]]))
    assert points.encode(torch.tensor([[-0.6, 0.0, 0.3]])).tolist() == [[0, 1, 1]]


def test_ternary_absmean_is_one_mean_per_expert() -> None:
    weight = torch.tensor([[4.0, -1.0, 1.1], [-4.0, 0.9, 1.0]])
    found = round_to_nearest(weight, TernaryAbsmean())
    assert found.weight.tolist() == [[2.0, 0.0, 2.0], [-2.0, 0.0, 0.0]]
    assert found.parameters["high"].tolist() == [[2.0], [2.0]]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([Asymmetric, Symmetric]))
def test_searching_the_range_never_costs(seed: int, bits: int, kind) -> None:
    weight = weights(8, 32, seed) ** 3
    norm = 2.4

    def distance(ratios: tuple[float, ...]) -> torch.Tensor:
        found = round_to_nearest(weight, kind(bits=bits, group_size=16, ratios=ratios, norm=norm))
        return (found.weight - weight).abs().pow(norm).view(8, 2, 16).sum(-1)

    wide = distance((1.0, 0.95, 0.9, 0.7, 0.5))
    for ratio in (1.0, 0.95, 0.9, 0.7, 0.5):
        assert (wide <= distance((ratio,))).all()


def test_searching_the_range_helps_heavy_tails() -> None:
    weight = weights(16, 64) ** 3
    plain = round_to_nearest(weight, Asymmetric(bits=2)).weight
    searched = round_to_nearest(weight, Asymmetric(bits=2, ratios=(1.0, 0.8, 0.6, 0.4))).weight
    assert (searched - weight).abs().pow(2.4).sum() < 0.8 * (plain - weight).abs().pow(2.4).sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_weights_are_refused(bad: float) -> None:
    weight = weights()
    weight[1, 2] = bad
    with pytest.raises(OptionError, match="NaN or infinite"):
        round_to_nearest(weight, TernaryMinMax())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Asymmetric(bits=9), "bits=9 is not a width of a grid: use 1 to 8"),
        (lambda: Symmetric(bits=0), "bits=0 is not a width"),
        (lambda: Asymmetric(bits=4, group_size=0), "group_size=0 is not possible"),
        (lambda: TernaryMinMax(group_size=-1), "group_size=-1 is not possible"),
        (lambda: Symmetric(bits=4, ratios=()), "one or more numbers above 0"),
        (lambda: Asymmetric(bits=4, ratios=(1.0, 0.0)), "one or more numbers above 0"),
    ],
)
def test_impossible_grids_are_refused(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()
