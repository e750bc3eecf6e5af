"""How far a figure can be trusted: intervals over seeds and by resampling, both deterministic."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; `n` is how many values it rests on. One value alone has low = high = mean."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def over_seeds(cls, values: Sequence[float]) -> "Interval":
        """Student's t interval of the mean of independent runs; raises ValueError without any."""
        data = _checked(values)
        mean = float(data.mean())
        if len(data) == 1:
            return cls(mean, mean, mean, 1)
        half = float(stdtrit(len(data) - 1, (1 + LEVEL) / 2) * data.std(ddof=1) / np.sqrt(len(data)))
        return cls(mean, mean - half, mean + half, len(data))

    @classmethod
    def bootstrap(
        cls, values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 1000, seed: int = 0
    ) -> "Interval":
        """Percentile interval of sum(values) / sum(weights) (by default of the mean), resampling the pairs.

        A pair is one sequence or one example: what is drawn independently. Raises ValueError without any, or where the
        weights sum to zero.
        """
        data = _checked(values)
        scale = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=np.float64)
        if scale.sum() <= 0:
            raise ValueError("an interval needs weights with a positive sum")
        mean = float(data.sum() / scale.sum())
        picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
        totals = scale[picks].sum(1)
        ratios = data[picks].sum(1)[totals > 0] / totals[totals > 0]
        low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(mean, float(min(low, mean)), float(max(high, mean)), len(data))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _checked(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"an interval needs at least one value, got an array of shape {data.shape}")
    return data
