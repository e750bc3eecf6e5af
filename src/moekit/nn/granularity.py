"""What is routed as one: every token by itself, or a stretch of them together.

Shapes by suffix: T tokens, H hidden size, E choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..contract import Context
from .parts import Site

Scorer = Callable[[Tensor, Context], Tensor]


class Token(nn.Module):
    """Every token by itself."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x_TH: Tensor, scorer: Scorer, context: Context) -> Tensor:
        return scorer(x_TH, context)


GRANULARITIES: dict[str, Callable[..., Any]] = {"token": Token}
"""By the name a configuration gives; called with (x_TH, scorer, context), returns logits [T, E]. A part of any
kind that needs more than the key-value cache to go on generating says ``cached = False``; the text is then run anew."""
