"""Planted outlier channels are found and nothing else, and smoothing leaves the function as it was."""

from __future__ import annotations

import pytest
import torch

from moekit.algebra import channel_peaks, outlier_scales, smoothing_scales
from moekit.errors import OptionError


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
        (lambda: smoothing_scales(torch.ones(2, 3), torch.ones(3, 2)), r"got \[2, 3\] and \[3, 2\]"),
        (lambda: smoothing_scales(torch.ones(2, 3), -torch.ones(2, 3)), "finite and at least 0"),
        (lambda: smoothing_scales(torch.ones(2, 3), torch.ones(2, 3), 1.5), "alpha=1.5 must lie between 0"),
        (lambda: outlier_scales(torch.tensor([1.0, float("inf")])), "finite and at least 0"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()
