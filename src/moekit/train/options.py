"""How long, how fast and in which order a model is trained: everything a run follows from, besides its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moekit.errors import OptionError

Course = Literal["constant", "linear", "cosine"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """AdamW with a linear warm-up over ``warmup`` of the steps, then a constant rate or one that falls to zero.

    ``max_norm`` clips the gradient; ``seed`` sets the random state anew at every step, so that a resumed run draws what
    an undisturbed one does. ``accumulate`` batches make a step; ``dtype`` is what products are computed in (weights and
    moments stay float32). Raises :class:`OptionError` on values out of range.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    course: Course = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 1.0
    seed: int = 0
    accumulate: int = 1
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"{self.steps} training steps: give 1 or more")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise OptionError(f"learning_rate={self.learning_rate} must be a positive number")
        if not 0 <= self.warmup <= 1:
            raise OptionError(f"warmup={self.warmup} is a share of the steps: give 0 to 1")
        if self.accumulate < 1:
            raise OptionError(f"accumulate={self.accumulate} batches in a step: give 1 or more")
        if self.dtype not in get_args(Precision):
            raise OptionError(f"dtype={self.dtype!r}: choose one of {', '.join(get_args(Precision))}")
        if self.course not in get_args(Course):
            raise OptionError(f"course={self.course!r}: choose one of {', '.join(get_args(Course))}")

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step (0 is the first)."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        if self.course == "constant":
            return 1.0
        return 1.0 - done if self.course == "linear" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
