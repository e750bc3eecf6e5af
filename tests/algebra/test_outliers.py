"""Planted outliers are found and nothing else, and smoothing leaves the function as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.algebra import channel_peaks, outlier_scales, smoothing_scales, super_experts
from moekit.errors import OptionError


def peaks(layers: int = 8, experts: int = 32, seed: int = 0) -> dict[int, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {layer: draw.uniform(20, 40, size=experts) for layer in range(layers)}


def test_the_planted_expert_is_found() -> None:
    planted = peaks()
    planted[2][7] = 3000
    assert super_experts(planted, 8) == ((2, 7),)


def test_late_layers_do_not_count() -> None:
    planted = peaks()
    planted[2][7], planted[6][1] = 3000, 90_000
    assert super_experts(planted, 8) == ((2, 7),)
    assert super_experts(planted, 8, depth=1.0) == ((6, 1),)
    # Layers count over the whole model, dense ones included.
    later = {layer + 8: peak for layer, peak in planted.items()}
    assert super_experts(later, 16) == ((10, 7),)
    assert super_experts(later, 20) == ((14, 1),)


def test_equal_peaks_give_none() -> None:
    assert super_experts({0: np.full(8, 50.0), 1: np.full(8, 50.0)}, 4) == ()
    assert super_experts({}, 4) == ()
    assert super_experts({3: np.ones(8)}, 4) == ()


def test_both_conditions_are_strict_and_the_tenth_is_rounded_down() -> None:
    flat = np.full(400, 1.0)
    flat[0], flat[1] = 109.0, 10.0  # 109 // 10 = 10, and 10 is not above it
    assert super_experts({0: flat}, 2) == ((0, 0),)
    flat[1] = 10.5  # above 10, though below 10.9
    assert super_experts({0: flat}, 2) == ((0, 0), (0, 1))
    flat[1:4] = 10.5  # four of 400 are not all in the highest half per cent
    assert super_experts({0: flat}, 2) == ((0, 0),)


def test_unrouted_experts_count_in_the_percentile() -> None:
    few = {0: np.array([100.0, 60.0])}
    many = {0: np.concatenate([few[0], np.zeros(400)])}
    assert super_experts(few, 2) == ((0, 0),)
    assert super_experts(many, 2) == ((0, 0), (0, 1))


def test_a_shared_expert_is_minus_one() -> None:
    assert super_experts(peaks(), 8, shared={1: 5000.0}) == ((1, -1),)


def test_smoothing_closed_form() -> None:
    activation = torch.tensor([[16.0, 1.0, 0.0], [4.0, 81.0, 0.0], [0.0, 0.0, 0.0]])
    weight = torch.tensor([[4.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1e-9, 1e-9, 1.0]])
    assert smoothing_scales(activation, weight, 0.5).tolist() == pytest.approx([2.0, 9.0, 1.0])
    assert smoothing_scales(activation, weight, 1.0).tolist() == pytest.approx([16.0, 81.0, 1.0])


def test_smoothing_keeps_the_function_and_evens_the_channels() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=draw)
    x[:, 3] *= 100
    consumers = torch.randn(4, 7, 12, generator=draw)
    activation = x.abs().amax(0).expand(4, 12)
    scale = smoothing_scales(activation, channel_peaks(consumers))
    torch.testing.assert_close((x / scale) @ (consumers * scale).transpose(1, 2), x @ consumers.transpose(1, 2))

    def spread(values: torch.Tensor) -> float:
        return float(values.abs().amax(0).max() / values.abs().amax(0).min())

    assert spread(x / scale) < 0.2 * spread(x)


def test_outlier_channels_only() -> None:
    peak = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 1
    peak[10] = 2.0
    assert torch.equal(outlier_scales(peak), torch.ones(100))
    peak[[3, 50]] = torch.tensor([64.0, 128.0])
    scale = outlier_scales(peak, alpha=0.5)
    assert (scale != 1).nonzero()[:, 0].tolist() == [3, 50]
    assert scale[[3, 50]].tolist() == pytest.approx([32**0.5, 8.0])


@pytest.mark.parametrize("peak", [torch.zeros(6), torch.ones(6), torch.ones(1), torch.tensor([0.0] * 20 + [5.0])])
def test_nothing_to_smooth(peak: torch.Tensor) -> None:
    assert torch.equal(outlier_scales(peak), torch.ones_like(peak))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: super_experts({4: np.ones(2)}, 4), "peaks of layer 4, but the model has layers 0 to 3"),
        (lambda: super_experts({0: np.array([np.nan])}, 4), "finite and at least 0"),
        (lambda: super_experts({0: np.ones(1)}, 4, shared={0: -1.0}), "finite and at least 0"),
        (lambda: smoothing_scales(torch.ones(2, 3), torch.ones(3, 2)), r"got \[2, 3\] and \[3, 2\]"),
        (lambda: smoothing_scales(torch.ones(2, 3), -torch.ones(2, 3)), "finite and at least 0"),
        (lambda: smoothing_scales(torch.ones(2, 3), torch.ones(2, 3), 1.5), "alpha=1.5 must lie between 0"),
        (lambda: outlier_scales(torch.tensor([1.0, float("inf")])), "finite and at least 0"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()
