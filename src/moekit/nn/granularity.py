"""What is routed as one: every token by itself, or a stretch of them together.

Only what looks back is fit for language models: a stretch that is routed by the mean of itself tells its first tokens
about its last ones. Shapes by suffix: T tokens, H hidden size, E choices, B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .flow import by_sequence, real
from .given import known_label, label_of
from .limits import Limited
from .parts import Site

Scorer = Callable[[Tensor, Context], Tensor]


class Token(nn.Module):
    """Every token by itself."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x_TH: Tensor, scorer: Scorer, context: Context) -> Tensor:
        return scorer(x_TH, context)


class Chunk(nn.Module):
    """``length`` tokens in a row go to the same experts, chosen by the mean of the chunk before them.

    The first chunk of a sequence goes by its first token. Not ``causal``: by the mean of the chunk itself, as Hydra's
    prototype does it; that leaks the future into language models.
    """

    cached = False
    length = Limited(int, lambda length, part: length >= 1, "chunks of {value} tokens: give 1 or more")

    def __init__(self, site: Site, *, length: int = 32, causal: bool = True) -> None:
        super().__init__()
        self.length, self.causal = length, causal

    def forward(self, x_TH: Tensor, scorer: Scorer, context: Context) -> Tensor:
        if not len(x_TH):
            return scorer(x_TH, context)
        x_BSH, real_BS = by_sequence(x_TH, context), by_sequence(real(x_TH, context), context)
        chunk_BS = (real_BS.long().cumsum(1) - 1).clamp(min=0) // self.length  # counted from the first real token
        rows = int(chunk_BS.max()) + 1
        sums = torch.zeros(len(x_BSH), rows, x_BSH.shape[2] + 1, dtype=torch.float32, device=x_TH.device)
        counted = torch.cat((x_BSH.to(sums.dtype), torch.ones_like(x_BSH[..., :1], dtype=sums.dtype)), dim=-1)
        index = chunk_BS[..., None].expand(-1, -1, sums.shape[2])
        sums = sums.scatter_add(1, index, counted * real_BS[..., None])
        pooled = sums[..., :-1] / sums[..., -1:].clamp(min=1)
        if self.causal:
            first = x_BSH[torch.arange(len(x_BSH), device=x_TH.device), real_BS.int().argmax(1)]
            pooled = torch.cat((first[:, None].to(pooled.dtype), pooled[:, :-1]), dim=1)
        pooled_BSH = pooled.gather(1, index[..., :-1])
        return scorer(pooled_BSH.reshape(x_TH.shape).to(x_TH.dtype), context)


class Sequence(nn.Module):
    """All of a sequence goes to the same experts: by its "first" token, its "last", or the "mean" of its tokens.

    "prefix" goes by the mean of the tokens so far, token by token, which is what a language model may know of its
    sequence; "first" leaks nothing either. Padding counts for nothing.
    """

    cached = False

    def __init__(self, site: Site, *, pool: str = "prefix") -> None:
        super().__init__()
        if pool not in ("first", "last", "mean", "prefix"):
            raise OptionError(f"pool={pool!r} of a sequence: choose first, last, mean or prefix")
        self.pool = pool

    def forward(self, x_TH: Tensor, scorer: Scorer, context: Context) -> Tensor:
        if not len(x_TH):
            return scorer(x_TH, context)
        x_BSH, real_BS = by_sequence(x_TH, context), by_sequence(real(x_TH, context), context)
        return scorer(self._pooled(x_BSH, real_BS).expand_as(x_BSH).reshape(x_TH.shape).to(x_TH.dtype), context)

    def _pooled(self, x_BSH: Tensor, real_BS: Tensor) -> Tensor:
        number = torch.arange(len(x_BSH), device=x_BSH.device)
        if self.pool == "first":
            return x_BSH[number, real_BS.int().argmax(1)][:, None]
        if self.pool == "last":
            return x_BSH[number, real_BS.shape[1] - 1 - real_BS.flip(1).int().argmax(1)][:, None]
        wide = x_BSH.to(torch.promote_types(x_BSH.dtype, torch.float32)) * real_BS[..., None]
        if self.pool == "mean":
            return wide.sum(1, keepdim=True) / real_BS.sum(1)[:, None, None].clamp(min=1)
        return wide.cumsum(1) / real_BS.cumsum(1)[..., None].clamp(min=1)


class Label(nn.Module):
    """Tokens with one given label go to the same experts: the scorer reads a vector learnt for it, not the token.

    ``label`` is "task" or "modality", of which there are ``labels`` (task-level routing, Kudugunta et al. 2021).
    """

    def __init__(self, site: Site, *, labels: int, label: str = "task") -> None:
        super().__init__()
        if labels < 1:
            raise OptionError(f"labels={labels}: give how many {label} ids there are, 1 or more")
        self.label, self.labels = known_label(label), labels
        self.vector = nn.Parameter(torch.zeros(labels, site.hidden_size))

    def initialise(self, std: float) -> None:
        init.normal_(self.vector)

    def forward(self, x_TH: Tensor, scorer: Scorer, context: Context) -> Tensor:
        label_T = label_of(context, self.label, self.labels)
        return scorer(self.vector[label_T].to(x_TH.dtype), context)


GRANULARITIES: dict[str, Callable[..., Any]] = {"token": Token, "chunk": Chunk, "sequence": Sequence, "label": Label}
"""By the name a configuration gives; called with (x_TH, scorer, context), returns logits [T, E]. A part of any
kind that needs more than the key-value cache to go on generating says ``cached = False``; the text is then run anew."""
