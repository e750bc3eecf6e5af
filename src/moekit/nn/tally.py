"""What counts how often each choice was taken, from one optimizer step to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from .flow import carry, recomputed


class Tally(nn.Module):
    """``count_E`` (int64 [E]): the assignments of a step while training, less padding; this process's own."""

    count_E: Tensor  # noqa: N815

    def __init__(self, choices: int) -> None:
        super().__init__()
        self.register_buffer("count_E", torch.zeros(choices, dtype=torch.int64), persistent=False)

    def initialise(self, std: float) -> None:
        init.zeros_(self.count_E)  # what is not saved is not there when a model is loaded

    def add(self, count_E: Tensor, context: Context) -> None:
        """Tell the carry of one pass over a batch, and keep it while training; a pass run again is not kept twice."""
        carry(context).load.append(count_E)
        if self.training and not recomputed():
            self.count_E += count_E

    def finish_step(self) -> None:
        """The optimizer has stepped: what was counted is forgotten."""
        self.count_E.zero_()
