"""Scorers that do not look at hidden states: logits come from outside.

Shapes by suffix: T tokens, H hidden size, E choices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .parts import Site

LABELS = ("modality", "task")


def label_of(context: Context, name: str, count: int | None = None) -> Tensor:
    """int64 [T]: what the context says each token's label is, one of ``count``.

    Raises :class:`OptionError` where it says nothing, or another number.
    """
    label_T = getattr(context, name)
    if label_T is None:
        raise OptionError(f"routing by {name} needs {name}_ids with the input")
    if count is not None and len(label_T):
        least, most = int(label_T.min()), int(label_T.max())
        if not 0 <= least <= most < count:
            raise OptionError(f"{name}_ids from {least} to {most}: there are {count} of them, 0 to {count - 1}")
    return label_T


def known_label(name: str) -> str:
    if name not in LABELS:
        raise OptionError(f"labels called {name!r}: choose one of {', '.join(LABELS)}")
    return name


class Given(nn.Module):
    """Expert i for the tokens with label i, and no other: 0 for it, -inf for the rest. Nothing is learnt.

    ``label`` is "modality" or "task". Raises :class:`OptionError` for labels without an expert.
    """

    def __init__(self, site: Site, *, label: str = "modality") -> None:
        super().__init__()
        self.label, self.choices = known_label(label), site.choices

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        label_T = label_of(context, self.label, self.choices)
        barred = torch.full((len(x_TH), self.choices), -torch.inf, dtype=x_TH.dtype, device=x_TH.device)
        return barred.scatter(1, label_T[:, None], 0.0)


class Hash(nn.Module):
    """Each word of the vocabulary has ``k`` experts for good, drawn from ``seed``: 0 for them, -inf for the rest.

    Hash layers (Roller et al. 2021): balanced over the vocabulary, nothing is learnt. Raises :class:`OptionError` where
    the input has no token ids.
    """

    expert_VK: Tensor  # noqa: N815

    def __init__(self, site: Site, *, seed: int = 0) -> None:
        super().__init__()
        self.site, self.seed = site, seed
        self.register_buffer("expert_VK", self._drawn(), persistent=False)

    def initialise(self, std: float) -> None:
        init.copy_(self.expert_VK, self._drawn())

    def _drawn(self) -> Tensor:
        """int64 [V, K]: neighbours in a random order of the experts, from a place that goes round with the word."""
        generator = torch.Generator().manual_seed(self.seed)
        words = torch.randperm(max(self.site.vocab_size, 1), generator=generator, device="cpu")
        order = torch.randperm(self.site.choices, generator=generator, device="cpu")
        return order[(words[:, None] + torch.arange(self.site.top_k, device="cpu")) % self.site.choices]

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        if context.input_ids is None:
            raise OptionError("routing by a hash of the token needs input_ids, not embeddings")
        barred = torch.full((len(x_TH), self.site.choices), -torch.inf, dtype=x_TH.dtype, device=x_TH.device)
        return barred.scatter(1, self.expert_VK[context.input_ids], 0.0)


class Offered(nn.Module):
    """Logits [T, E] that whoever calls the router has computed: ``context.extra["offered"]``."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        if "offered" not in context.extra:
            raise OptionError("the scorer 'offered' only works where something offers logits, as in attention by query")
        return context.extra["offered"]
