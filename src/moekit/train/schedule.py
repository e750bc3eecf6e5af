"""Shrinking the sparse remainder of low-rank experts while they train: importance, a cubic schedule, one threshold.

MC-SMoE (arXiv 2310.01334) after LoSparse (arXiv 2306.11222) and Zhu & Gupta (arXiv 1710.01878).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moekit.blocks import MoEBlock
from moekit.errors import OptionError
from moekit.train.forms import LowRankSparse
from moekit.train.parametrise import held


def cubic(step: int, steps: int, final: float, warm: int, cool: int) -> float:
    """The share of rows kept after ``step`` of ``steps``: 1 for ``warm`` steps, ``final`` for the last ``cool``,
    ``final + (1 - final) (1 - t)^3`` between."""
    if step <= warm:
        return 1.0
    if step >= steps - cool:
        return final
    progress = (step - warm) / (steps - cool - warm)
    return final + (1 - final) * (1 - progress) ** 3


@dataclass
class RowPruning:
    """Prunes rows of every remainder of the given blocks to a global threshold: give it to training as ``after_step``.

    Blocks must be parametrised by :class:`LowRankSparse` before. ``warm`` and ``cool`` are shares of the steps.
    """

    blocks: Sequence[MoEBlock]
    steps: int
    final: float = 0.1
    warm: float = 0.1
    cool: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1 or self.warm + self.cool >= 1:
            raise OptionError(
                f"rows kept={self.final:g} is a share, and warm={self.warm:g} and cool={self.cool:g} must leave steps "
                "between them"
            )
        found = [(form, tensors[2]) for block in self.blocks for _, form, tensors in held(block)]
        self._forms = [(form, rest) for form, rest in found if isinstance(form, LowRankSparse)]
        if not self._forms or len(self._forms) != len(found):
            raise OptionError("rows can be pruned only where experts are trained as low rank plus rows")
        for form, rest in self._forms:
            assert isinstance(rest, nn.Parameter)
            rest.register_post_accumulate_grad_hook(lambda p, form=form: form.score(p.detach(), p.grad))

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Keep the rows of highest importance, as many as the schedule leaves; a pruned row stays pruned."""
        share = cubic(step, self.steps, self.final, int(self.warm * self.steps), int(self.cool * self.steps))
        scores = torch.cat([form.importance.masked_fill(~form.keep, -1).flatten() for form, _ in self._forms])
        count = round(share * len(scores))
        best = torch.zeros_like(scores, dtype=torch.bool)
        best[scores.sort(descending=True, stable=True).indices[:count]] = True
        for (form, rest), part in zip(self._forms, best.split([f.keep.numel() for f, _ in self._forms]), strict=True):
            form.keep &= part.view_as(form.keep)
            rest.mul_(form.keep[:, :, None])
