"""Nested planes: they add up, every plane halves nothing but helps, and the closed form holds."""

from __future__ import annotations

import itertools

import pytest
import torch

from moekit.algebra import Asymmetric, gptq, nested, round_to_nearest, second_moments
from moekit.errors import OptionError
from moekit.formats import _grid


def weights(experts: int = 3) -> torch.Tensor:
    return torch.randn(experts, 8, 24, generator=torch.Generator().manual_seed(0)) * 0.05


def moments(experts: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(experts, 100, 4, generator=draw) @ torch.randn(experts, 4, 24, generator=draw)
    return torch.stack([second_moments(part + 0.3 * torch.randn(100, 24, generator=draw)) for part in x])


def test_closed_form() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.5, 5.0, 6.0]])
    planes = nested(weight, Asymmetric(bits=2), 2)
    assert planes.base.weight.tolist() == [[0.0, 0.0, 2.0, 4.0, 4.0, 6.0]]
    # Residuals 0, 1, 0, -0.5, 1, 0: the signs take their mean size, and a zero counts as plus.
    step = float(torch.tensor(2.5 / 6).bfloat16())
    assert planes.signs[0].weight.tolist() == [[step, step, step, -step, step, step]]
    assert torch.equal(planes.weight(1), planes.base.weight + planes.signs[0].weight)
    assert torch.equal(planes.weight(2), planes.weight(1) + planes.signs[1].weight)


@pytest.mark.parametrize("group_size", [None, 7, 8])
def test_every_plane_lowers_the_error(group_size: int | None) -> None:
    weight = weights()
    base = Asymmetric(bits=2, group_size=group_size)
    planes = nested(weight, base, 4)
    assert torch.equal(planes.weight(0), round_to_nearest(weight, base).weight)
    errors = [((planes.weight(k) - weight) ** 2).sum((1, 2)) for k in range(5)]
    for worse, better in itertools.pairwise(errors):
        assert (better < 0.7 * worse).all()
    assert planes.signs[0].codes.max() == 1
    assert planes.signs[0].parameters["scales"].shape == planes.base.parameters["scales"].shape


def output_error(weight, found, hessian) -> torch.Tensor:
    difference = (weight - found).double()
    return (difference @ hessian.double() * difference).sum((1, 2))


@pytest.mark.parametrize("column_feedback", [False, True])
@pytest.mark.parametrize("group_size", [None, 7, 8])
def test_with_second_moments_every_plane_lowers_the_output_error(group_size, column_feedback) -> None:
    weight, hessian = weights(), moments()
    base = Asymmetric(bits=2, group_size=group_size)
    planes = nested(weight, base, 3, hessian, block=8, column_feedback=column_feedback)
    errors = [output_error(weight, planes.weight(k), hessian) for k in range(4)]
    for worse, better in itertools.pairwise(errors):
        assert (better < worse).all()
    for report, error in zip(planes.reports, errors, strict=True):
        assert report.error == pytest.approx(error.tolist(), rel=1e-3)
    assert sum(errors[0]) < sum(output_error(weight, round_to_nearest(weight, base).weight, hessian))


def test_scales_are_the_least_squares_of_the_outputs() -> None:
    weight, hessian = weights(1)[0], moments(1)[0]
    planes = nested(weight, Asymmetric(bits=2, group_size=8), 1, hessian, block=8)
    plane, residual = planes.signs[0], weight - planes.base.weight
    assert (plane.parameters["scales"] > 0).all()
    best = output_error(residual[None], plane.weight[None], hessian)
    for factor in (0.9, 1.1):
        for group in range(3):
            other = plane.weight.clone()
            other[:, 8 * group : 8 * group + 8] *= factor
            assert output_error(residual[None], other[None], hessian) > best


def test_stored_planes_decode_to_the_same() -> None:
    planes = nested(weights(), Asymmetric(bits=2, group_size=7), 2, moments(), block=8)
    for plane in planes.signs:
        codes, scales, mins = (t.flatten(0, 1) for t in (plane.codes, *plane.parameters.values()))
        assert torch.equal(_grid.decode(codes, scales, mins, 7, torch.float32), plane.weight.flatten(0, 1))


def test_an_expert_without_inputs_is_rounded_and_named() -> None:
    weight, hessian = weights(), moments()
    hessian[1] = 0
    base = Asymmetric(bits=2, group_size=8)
    swept, plain = nested(weight, base, 2, hessian), nested(weight, base, 2)
    assert torch.equal(swept.weight(2)[1], plain.weight(2)[1])
    assert all(report.fallbacks == {1: "it got no inputs"} for report in swept.reports)


def test_no_planes_is_gptq() -> None:
    weight, hessian = weights(), moments()
    grid = Asymmetric(bits=2, group_size=8)
    planes = nested(weight, grid, 0, hessian, column_feedback=True)
    assert torch.equal(planes.weight(0), gptq(weight, hessian, grid)[0].weight)


def test_what_does_not_exist_is_refused() -> None:
    planes = nested(weights(), Asymmetric(bits=2), 2)
    with pytest.raises(OptionError, match="plane 3 does not exist: these weights have a base and 2 planes"):
        planes.weight(3)
    with pytest.raises(OptionError, match="planes=-1 is not possible"):
        nested(weights(), Asymmetric(bits=2), -1)
