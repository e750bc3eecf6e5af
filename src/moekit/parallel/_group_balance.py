"""The load-balance term over all tokens of an expert-parallel group instead of each micro-batch alone.

A micro-batch of one domain may then use few experts, as long as the group's tokens together use all of them.
Shapes by suffix: T tokens of this rank, K slots, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekit.blocks import MoEBlock
from moekit.parallel._world import World
from moekit.train.balance import Balance


def group_term(scores_TE: Tensor, expert_TK: Tensor, world: World) -> Tensor:
    """E * sum_e f_e P_e with f and P over the tokens of all ranks of a world; a collective call.

    ``scores`` need not sum to 1. The value is the same on every rank; its gradient is that of this rank's tokens, so
    that gradients summed over ranks are those of one process with all tokens. A rank without tokens takes part.
    """
    count = scores_TE.shape[-1]
    used = expert_TK[(expert_TK >= 0) & (expert_TK < count)]
    load = torch.bincount(used.reshape(-1), minlength=count)
    mass = (scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)).sum(0)
    own = torch.cat([load.double(), mass.detach().double(), load.new_tensor([len(scores_TE)]).double()])
    # float64 holds every count exactly; ranks add in the same order
    total = world.gather(own, "balance").sum(0).to(mass.device)
    load_E, mass_E, tokens = total[:count], total[count:-1], total[-1].clamp(min=1)
    everybody = mass_E.to(mass.dtype) + mass - mass.detach()
    share = (load_E / load_E.sum().clamp(min=1)).to(mass.dtype)
    return count * (share * everybody).sum() / tokens.to(mass.dtype)


class GroupBalance(Balance):
    """As :class:`moekit.train.balance.Balance`, over the group: every rank must run the same layers equally often."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model)
        self.world = world

    def _hook(self, block: MoEBlock) -> Any:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            logits = block.router.logits(output, args[0])[:, : block.num_experts]
            expert, _ = block.router.read(output)
            self._terms.append(group_term(block.router.recipe.scores(logits), expert, self.world))

        return collect
