"""Routers that no recipe describes, or that speak another form than ``(logits, weights, ids)``: one class each.

Each class overrides only what differs. ``ROUTERS`` is the table, by the class name of the live module.
Shapes by suffix: T tokens, H hidden size, K slots, E experts, S shared experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import PAD, Context, Routing
from ..errors import PlanError
from .contracted import ContractRouter, keeps_contract
from .recipe import Recipe
from .router import FamilyRouter, filled


class TokenHash(FamilyRouter):
    """DeepSeek-V4's first layers: the choice is a table by token id, only the weights come from the hidden state."""

    chooses = False

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        assert context.input_ids is not None, "a hash router needs Context(input_ids=...)"
        expert = self.module.tid2eid[context.input_ids.reshape(-1)].long()
        forbidden = (logits_TE == -math.inf).gather(1, expert)
        if bias is not None:
            edit = bias.to(logits_TE.device).expand(expert.shape[0], -1)
            forbidden = forbidden | (edit.gather(1, expert) == -math.inf)
        return expert.masked_fill(forbidden, PAD)


class SharedLogSigmoid(FamilyRouter):
    """Inkling: sigmoid scores choose; weights are one softmax of log-sigmoids over the chosen and the shared experts.

    Logits have S columns beyond the experts for the shared ones, whose weights (gammas) are the fourth output.
    """

    @classmethod
    def build(cls, module: Any, parent: nn.Module, num_experts: int) -> SharedLogSigmoid:
        recipe = Recipe(top_k=module.top_k, activation="sigmoid", bias_name="e_score_correction_bias")
        return cls(module, parent, num_experts, recipe)

    def logits(self, output: Any, x_TH: Tensor) -> Tensor:
        return F.linear(x_TH.float(), self.module.weight.float())

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        return self.recipe.select(logits_TE[:, : self.num_experts], self.bias(context), bias)

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        return self._joint(logits_TE, expert_TK)[:, : expert_TK.shape[1]]

    def _joint(self, logits: Tensor, expert: Tensor) -> Tensor:
        chosen = logits.gather(1, expert.clamp(min=0)).masked_fill(expert < 0, -math.inf)
        joint = F.logsigmoid(torch.cat([chosen, logits[:, self.num_experts :]], dim=1)).softmax(dim=1)
        return joint * self.module.route_scale * self.module.global_scale.float()

    def write(self, output: Any, routing: Routing, context: Context) -> Any:
        logits, weight, index, gammas = output
        assert routing.logits is not None
        shared = self._joint(routing.logits, routing.expert)[:, routing.expert.shape[1] :]
        routed = routing.logits[:, : self.num_experts]
        return routed.to(logits), routing.weight.to(weight), filled(routing).to(index), shared.contiguous().to(gammas)


class SparseMixer(FamilyRouter):
    """PhiMoE: SparseMixer-v2 at inference (arXiv 2409.12136). The second expert is weighed as if the first were absent.

    Each weight is a softmax over the experts whose logit is within ``2 * jitter`` of the best left, relative to it.
    """

    @classmethod
    def build(cls, module: Any, parent: nn.Module, num_experts: int) -> SparseMixer:
        return cls(module, parent, num_experts, Recipe(top_k=module.top_k, ranked="logits"))

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        # One maximum after another, as the family does: top-k breaks the ties of half precision in another way.
        left = logits_TE if bias is None else logits_TE + bias.to(logits_TE)
        chosen: list[Tensor] = []
        for _ in range(self.recipe.top_k):
            best, expert = left.max(dim=-1, keepdim=True)
            chosen.append(expert.masked_fill(best == -math.inf, PAD))
            left = left.scatter(1, expert, -math.inf)
        return torch.cat(chosen, dim=1)

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        left, weights = logits_TE, []
        for expert in expert_TK.clamp(min=0).unbind(1):
            best = left.max(dim=-1, keepdim=True).values
            size = torch.maximum(logits_TE.abs(), best)
            near = left.masked_fill((best - logits_TE) / size > 2 * self.module.router_jitter_noise, -math.inf)
            weights.append(near.softmax(-1).gather(1, expert[:, None]).nan_to_num(0.0))
            left = left.scatter(1, expert[:, None], -math.inf)
        return torch.cat(weights, dim=1).masked_fill(expert_TK < 0, 0)


class InputScores(FamilyRouter):
    """Llama 4: dense sigmoid scores [T, E] (0 where not chosen), then logits; all experts run, on scaled inputs."""

    positions = (1, 0, 0)

    @classmethod
    def build(cls, module: Any, parent: nn.Module, num_experts: int) -> InputScores:
        return cls(module, parent, num_experts, Recipe(top_k=module.top_k, activation="sigmoid", ranked="logits"))

    def logits(self, output: Any, x_TH: Tensor) -> Tensor:
        return output[1]

    def read(self, output: Any) -> tuple[Tensor, Tensor]:
        weight, expert = output[0].topk(self.recipe.top_k, dim=-1)
        return expert, weight

    def write(self, output: Any, routing: Routing, context: Context) -> Any:
        assert routing.logits is not None
        return routing.dense(self.num_experts).to(output[0]), routing.logits.to(output[1])


class LogitsOnly(FamilyRouter):
    """DBRX: the router returns logits, the block chooses; weights are divided by their p-norm if the block says so."""

    at_experts = True

    @classmethod
    def build(cls, module: nn.Module, parent: Any, num_experts: int) -> LogitsOnly:
        p = parent.moe_normalize_expert_weights
        recipe = Recipe(top_k=parent.top_k, normalise=None if p is None else ("norm", float(p)), widen=False)
        return cls(module, parent, num_experts, recipe)

    def logits(self, output: Any, x_TH: Tensor) -> Tensor:
        return output


class CapacityTop1(FamilyRouter):
    """Switch: one expert by softmax; within a sequence, tokens beyond an expert's capacity are not routed at all."""

    at_experts = True

    @classmethod
    def build(cls, module: nn.Module, parent: nn.Module, num_experts: int) -> CapacityTop1:
        return cls(module, parent, num_experts, Recipe(top_k=1), input_dims=3)

    def logits(self, output: Any, x_TH: Tensor) -> Tensor:
        return output[2].reshape(-1, output[2].shape[-1])

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        expert = self.recipe.select(logits_TE, None, bias)
        rows = 1 if context.sequence is None else int(context.sequence.unique().numel())
        taken = F.one_hot(expert.reshape(rows, -1).clamp(min=0), self.num_experts).cumsum(dim=1)
        place = taken.reshape(-1, self.num_experts).gather(1, expert.clamp(min=0))
        return expert.masked_fill(place > self.module.expert_capacity, PAD)

    def read_call(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(ids, weights) [T, K] from the experts' one-hot call; a token without expert has PAD."""
        chosen = args[1]
        return chosen.argmax(-1).masked_fill(chosen.sum(-1) == 0, PAD), args[2]

    def write_call(self, args: tuple[Any, ...], routing: Routing) -> tuple[Any, ...]:
        one_hot = F.one_hot(routing.expert.clamp(min=0), self.num_experts) * routing.used[..., None]
        return (args[0], one_hot.to(args[1].dtype), routing.weight.to(args[2].dtype))


class Grouped(FamilyRouter):
    """JetMoE: (sorted slots, token of each, weight of each, tokens per expert, logits); softmax over the chosen."""

    @classmethod
    def build(cls, module: Any, parent: nn.Module, num_experts: int) -> Grouped:
        return cls(module, parent, num_experts, Recipe(top_k=module.top_k, ranked="logits", weights="softmax"))

    def logits(self, output: Any, x_TH: Tensor) -> Tensor:
        return output[4]

    def read(self, output: Any) -> tuple[Tensor, Tensor]:
        slots, _, sorted_weight, sizes, logits = output
        expert = torch.empty_like(slots)
        weight = torch.empty_like(sorted_weight)
        expert[slots] = torch.arange(len(sizes), device=slots.device).repeat_interleave(slots.new_tensor(sizes))
        weight[slots] = sorted_weight
        return expert.view(logits.shape[0], -1), weight.view(logits.shape[0], -1)

    def write(self, output: Any, routing: Routing, context: Context) -> Any:
        expert = filled(routing).flatten()
        slots = expert.argsort(stable=True)
        sizes = torch.bincount(expert, minlength=self.num_experts).tolist()
        weight = routing.weight.flatten()[slots].to(output[2].dtype)
        return slots, slots.div(routing.expert.shape[1], rounding_mode="trunc"), weight, sizes, routing.logits


class ProductKeys(FamilyRouter):
    """Doge: expert (i, j) of a square scores ``x_i + y_j``, the halves of one projection; softmax over the chosen.

    The family views the projection as two halves of the whole batch, which mixes tokens: kept as it is.
    """

    inline = True

    @classmethod
    def build(cls, module: Any, parent: Any, num_experts: int) -> ProductKeys:
        return cls(module, parent, num_experts, Recipe(top_k=parent.top_k, ranked="logits", weights="softmax"))

    def score(self, x_TH: Tensor, context: Context) -> Tensor:
        x_scores, y_scores = self.module(x_TH).view(2, x_TH.shape[0], -1)
        return (x_scores[:, :, None] + y_scores[:, None, :]).flatten(1)

    def logits(self, output: Any, x_TH: Tensor) -> Tensor:
        return self.score(x_TH, Context())

    def _keys(self, experts: list[int]) -> list[int]:
        return list(dict.fromkeys(expert // math.isqrt(self.num_experts) for expert in experts))

    def check_kept(self, name: str, experts: list[int]) -> None:
        side, keys = math.isqrt(self.num_experts), self._keys(experts)
        if experts != [i * side + j for i in keys for j in keys]:
            raise PlanError(
                f"{name} addresses experts as a {side} x {side} square of keys, the same keys on both sides: keep the "
                "experts i * side + j for all i and j of one list of keys, in that order"
            )

    def own_rows(self, tensor_name: str, experts: list[int]) -> list[int] | None:
        if not tensor_name.startswith("router_gate"):
            return None
        side, keys = math.isqrt(self.num_experts), self._keys(experts)
        return [*keys, *(side + key for key in keys)]


ROUTERS: dict[str, type[FamilyRouter]] = {
    "DeepseekV4HashRouter": TokenHash,
    "InklingTopkRouter": SharedLogSigmoid,
    "PhimoeTopKRouter": SparseMixer,
    "Llama4Router": InputScores,
    "DbrxRouter": LogitsOnly,
    "SwitchTransformersTop1Router": CapacityTop1,
    "JetMoeTopKGating": Grouped,
    "DogeCDMoE": ProductKeys,
}
"""By class name of the live router module, or of its block where the block routes inline."""


def router_for(module: nn.Module, parent: nn.Module, num_experts: int) -> FamilyRouter:
    """The router of a live module: its own stages, its class from the table, or a recipe found by experiment."""
    if keeps_contract(module):
        return ContractRouter.build(module, parent, num_experts)
    names = [cls.__name__ for kind in (type(module), type(parent)) for cls in kind.__mro__]
    found = next((ROUTERS[name] for name in names if name in ROUTERS), FamilyRouter)
    return found.build(module, parent, num_experts)
