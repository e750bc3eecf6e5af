"""How long, how fast and in which order a model is trained: everything a run follows from, besides its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from moekit.errors import OptionError
from moekit.nn.parts import fits

Course = Literal["constant", "linear", "cosine"]
Precision = Literal["float32", "bfloat16"]

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "steps": ("a whole number from 1 on", lambda value: value >= 1),
    "learning_rate": ("a number above 0", lambda value: value > 0),
    "warmup": ("a share of the steps, from 0 to 1", lambda value: 0 <= value <= 1),
    "weight_decay": ("a number from 0 on", lambda value: value >= 0),
    "betas": ("two numbers from 0 on and below 1", lambda value: len(value) == 2 and 0 <= min(value) <= max(value) < 1),
    "eps": ("a number from 0 on", lambda value: value >= 0),
    "max_norm": ("a number from 0 on (0 clips nothing)", lambda value: value >= 0),
    "seed": ("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32),
    "accumulate": ("a whole number from 1 on", lambda value: value >= 1),
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """AdamW with a linear warm-up over ``warmup`` of the steps, then a constant rate or one that falls to zero.

    ``max_norm`` clips the gradient; ``seed`` sets the random state anew at every step, so that a resumed run draws what
    an undisturbed one does. ``accumulate`` batches make a step; ``dtype`` is what products are computed in (weights and
    moments stay float32). Raises :class:`OptionError` on values of another type or out of range.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    course: Course = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: Sequence[float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 1.0
    seed: int = 0
    accumulate: int = 1
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainOptions).items():
            value = getattr(self, name)
            said, within = _RANGES.get(name) or (f"one of {', '.join(get_args(kind))}", lambda _: True)
            if not (fits(value, kind) and within(value)):
                raise OptionError(f"{name}={value!r}: give {said}")

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step (0 is the first)."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        if self.course == "constant":
            return 1.0
        return 1.0 - done if self.course == "linear" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
