"""A router that keeps the contract itself: its own stages, nothing to be identified."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from ..contract import Context, Routing
from ..contract import Router as Contract
from .recipe import Recipe
from .router import FamilyRouter


class ContractRouter(FamilyRouter):
    """Over a live module with ``score``, ``select`` and ``weigh`` that is called with (hidden, context) and returns
    (logits, weights, ids), an unused slot having the id ``num_experts``. ``top_k`` is the most slots a token uses."""

    @classmethod
    def build(cls, module: Any, parent: nn.Module, num_experts: int) -> Self:
        return cls(module, parent, num_experts, Recipe(top_k=module.top_k), rows=module.num_experts)

    def score(self, x_TH: Tensor, context: Context) -> Tensor:
        return self.module.score(x_TH, context)

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        return self.module.select(logits_TE, context, bias)

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        return self.module.weigh(logits_TE, expert_TK, context)

    def read(self, output: Any) -> tuple[Tensor, Tensor]:
        routing = self.module.routing(output)
        return routing.expert, routing.weight

    def write(self, output: Any, routing: Routing, context: Context) -> Any:
        expert, weight = routing.stock(self.module.num_experts)
        return routing.logits, weight.to(output[1].dtype), expert

    def context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Context]:
        x_TH, context = (*args, *kwargs.values(), None)[:2]
        return x_TH, self.entered(x_TH, context or Context())

    def entered(self, x_TH: Tensor, context: Context) -> Context:
        return self.module.entered(x_TH, context)


def keeps_contract(module: nn.Module) -> bool:
    """Whether a live router module has the contract's stages itself."""
    return isinstance(module, Contract)
