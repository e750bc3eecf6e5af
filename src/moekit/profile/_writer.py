"""Several sequences written token by token with a cache, and which experts each of them used so far.

Shapes by suffix: R rows (sequences), V vocabulary, E experts; one usage array per MoE layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from moekit.blocks import blocks
from moekit.errors import UnsupportedModelError

ROWS = 64
"""Sequences or beams that run together; results do not depend on it beyond float accuracy."""


class Writer:
    """``step`` feeds one token per row; ``choose_rows`` makes the rows copies of earlier ones. A context manager."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.blocks = blocks(model, shared=True)
        self._device = next(model.parameters()).device
        self._cache: Any = None
        self._open = ExitStack()
        self.usage_RE: list[Tensor] = [torch.zeros(0, block.num_experts) for block in self.blocks]

    def __enter__(self) -> Writer:
        for index, block in enumerate(self.blocks):
            self._open.enter_context(block.observe(partial(self._count, index)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()
        self._cache = None

    @torch.no_grad()
    def step(self, id_R: Tensor) -> Tensor:
        """Log-probabilities [R, V] of what comes after these tokens, float32 on the CPU.

        Raises UnsupportedModelError where the model keeps no cache whose rows can be rearranged.
        """
        if self._cache is None:
            self.usage_RE = [torch.zeros(len(id_R), block.num_experts) for block in self.blocks]
        output = self.model(input_ids=id_R[:, None].to(self._device), past_key_values=self._cache, use_cache=True)
        self._cache = getattr(output, "past_key_values", None)
        if not _can_be_shared(self._cache):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} keeps no cache that beams can share: only models with one can write text"
            )
        return output.logits[:, -1].float().log_softmax(-1).cpu()

    def choose_rows(self, row_R: Tensor) -> None:
        """Row i goes on from what row ``row_R[i]`` has written."""
        self._cache.reorder_cache(row_R.to(self._device))
        self.usage_RE = [usage[row_R] for usage in self.usage_RE]

    def imbalance(self) -> Tensor:
        """[R] in 0..1: how unevenly each row has used the experts, mean over layers.

        ``sqrt(E / (E - 1) * sum_e (u_e - 1 / E)^2)`` with u the shares of its (token, slot) pairs: 0 if all experts did
        the same, 1 if one did everything.
        """
        layers = []
        for usage_RE in self.usage_RE:
            count = usage_RE.shape[1]
            share_RE = usage_RE.double() / usage_RE.sum(1, keepdim=True).clamp(min=1)
            layers.append(((share_RE - 1 / count).square().sum(1) * count / max(count - 1, 1)).sqrt())
        return torch.stack(layers).mean(0)

    def _count(self, index: int, observation: Any) -> None:
        expert, block, rows = observation.routing.expert.cpu(), self.blocks[index], len(self.usage_RE[index])
        if len(expert) != rows:
            raise UnsupportedModelError(
                f"{block.name} was given {len(expert)} tokens of {rows}: only models whose experts see the text's own "
                "tokens can be followed"
            )
        marks = torch.zeros(len(expert), block.num_experts + 1)
        marks.scatter_add_(1, torch.where(expert < 0, block.num_experts, expert), torch.ones(expert.shape))
        self.usage_RE[index] += marks[:, :-1]


def _can_be_shared(cache: Any) -> bool:
    """Whether its rows can be rearranged. A kind that selects rows in its own way but inherits the reordering has state
    of its own that the inherited way would leave where it was."""
    kind = type(cache)
    if not issubclass(kind, Cache):
        return False
    own_rows = kind.batch_select_indices is not Cache.batch_select_indices
    return not own_rows or kind.reorder_cache is not Cache.reorder_cache


def usual_tokens(model: PreTrainedModel) -> list[int]:
    """All ids of the vocabulary but those that begin, end or pad a text."""
    config, generation = model.config.get_text_config(), getattr(model, "generation_config", None)
    special: set[int | None] = set()
    for owner in (config, generation):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(owner, name, None)
            special.update(value if isinstance(value, Sequence) else [value])
    return [token for token in range(config.vocab_size) if token not in special]
