"""The load-balance term of every router of a model while it trains.

Shapes by suffix: T tokens, K slots, E experts.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from moekit.blocks import MoEBlock, blocks


class Balance:
    """While it is open, collects E * sum_e f_e P_e of each router that runs (Switch Transformer, equations 4 to 6).

    f_e is the share of (token, slot) pairs that went to expert e, P_e its mean probability: the router's own scores,
    made to sum to 1. 1 is perfect balance. :meth:`take` gives the sum over layers and forgets it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = blocks(model)
        self._terms: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for block in self.blocks:
            self._hooks.append(block.router_module.register_forward_hook(self._hook(block)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self) -> Tensor:
        """The sum of the terms since the last call."""
        total = torch.stack(self._terms).sum()
        self._terms = []
        return total

    def _hook(self, block: MoEBlock) -> Any:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            logits = block.router.logits(output, args[0])[:, : block.num_experts]
            expert, _ = block.router.read(output)
            self._terms.append(term(block.router.recipe.scores(logits), expert))

        return collect


def term(scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """E * sum_e f_e P_e for scores that need not sum to 1."""
    count = scores_TE.shape[-1]
    used = expert_TK[(expert_TK >= 0) & (expert_TK < count)]
    load = torch.bincount(used.reshape(-1), minlength=count).to(scores_TE) / max(1, used.numel())
    probability = (scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)).mean(0)
    return count * (load * probability).sum()
