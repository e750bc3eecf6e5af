"""Balance without a loss: a bias that only selection sees, moved after every optimizer step by the loads.

Shapes by suffix: E choices.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .limits import positive

Update = Literal["sign", "proportional"]
Course = Literal["constant", "1/sqrt(n)", "1/n"]


class Correction(nn.Module):
    """``b_i += u * sign(mean(c) - c_i)``, or u times the relative error itself ("proportional").

    Wang et al. 2024 (auxiliary-loss-free load balancing), algorithm 1: u = 1e-3, counts of the whole batch of a step.
    ``course`` lets u shrink with the steps n, as the theory of the same update suggests.
    """

    steps: Tensor
    rate = positive("rate={value} of a bias correction must be positive")

    def __init__(self, *, rate: float = 1e-3, update: Update = "sign", course: Course = "constant") -> None:
        super().__init__()
        if update not in get_args(Update):
            raise OptionError(f"update={update!r} of a bias correction: choose one of {', '.join(get_args(Update))}")
        if course not in get_args(Course):
            raise OptionError(f"course={course!r} of a bias correction: choose one of {', '.join(get_args(Course))}")
        self.rate, self.update, self.course = rate, update, course
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self, bias_E: Tensor, count_E: Tensor, active_E: Tensor | None = None) -> None:
        """Move ``bias_E`` in place. Experts outside ``active_E`` (bool) were no candidates: they stay as they are."""
        active = torch.ones_like(count_E, dtype=torch.bool) if active_E is None else active_E.to(count_E.device)
        count = count_E.to(torch.float32)
        mean = count[active].mean()
        if not bool(active.any()) or mean == 0:
            return
        self.steps += 1
        error = (mean - count) / mean
        move = error.sign() if self.update == "sign" else error
        bias_E += (self._rate() * move).masked_fill(~active, 0).to(bias_E.dtype)

    def _rate(self) -> float:
        steps = int(self.steps)
        slower = {"constant": 1.0, "1/sqrt(n)": math.sqrt(steps), "1/n": float(steps)}
        return self.rate / slower[self.course]


def max_violation(count_E: Tensor) -> float:
    """MaxVio = (max_i c_i - mean c) / mean c (Wang et al. 2024); 0 where nothing was counted."""
    mean = float(count_E.to(torch.float32).mean())
    return float(count_E.max()) / mean - 1 if mean else 0.0
