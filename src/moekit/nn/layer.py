"""One MoE layer: a router decides, experts compute, balance terms listen.

Shapes by suffix: T tokens, H hidden size, E experts with weights, K slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..contract import Context, Routing
from .balance import Seen
from .correction import Correction
from .flow import begin, carry, counted, gathered, real
from .router import Router
from .tally import Tally


class MoE(nn.Module):
    """``y = sum_i w_i E_i(x) + shared(x)``.

    Args:
        router: chooses among the experts, then among ``others``; may use any number of slots per token.
        experts: called with (x [T, H], ids [T, K], weights [T, K]); the id E marks a slot it has nothing to do for.
        shared: what every token passes besides.
        others: experts of other kinds, one choice each, with the ids from E on: called with the rows [M, H] of their
            tokens, they return as many, or None for zeros; one with ``ordered = True`` is told their sequences [M] too.
        balance: terms by name, each with the weight of its value; they go to the carry's losses while training.
        correction: moves the router's bias after each optimizer step (:meth:`finish_step`).
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module,
        *,
        shared: nn.Module | None = None,
        others: Sequence[nn.Module] = (),
        balance: Mapping[str, tuple[float, nn.Module]] | None = None,
        correction: Correction | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.experts = router, experts
        self.shared_expert = shared
        self.others = nn.ModuleList(others)
        balance = balance or {}
        self.balance = nn.ModuleDict({name: term for name, (_, term) in balance.items()})
        self.weight_of = Weights({name: weight for name, (weight, _) in balance.items()})
        self.correction = correction
        self.tally = Tally(router.num_experts)

    @property
    def num_experts(self) -> int:
        """Experts with weights, the others not counted."""
        return self.gate.num_experts - len(self.others)

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[.., H]."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        context = context or begin(1, len(x_TH), x_TH.device)
        context = self.gate.entered(x_TH, context)  # balance terms see the same scores, also where they are drawn
        routing = self.gate.routing(self.gate(x_TH, context))
        y_TH = self.routed(x_TH, routing, context)
        self._tell(x_TH, routing, context)
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert(x_TH)
        return y_TH.reshape(hidden_states.shape)

    def routed(self, x_TH: Tensor, routing: Routing, context: Context) -> Tensor:
        """What the chosen experts add [T, H], of every kind."""
        count = self.num_experts
        own = routing.used & (routing.expert < count)
        expert = torch.where(own, routing.expert, count)
        y_TH = self.experts(x_TH, expert, routing.weight * own)
        for number, other in enumerate(self.others, start=count):
            sequence = context.sequence if getattr(other, "ordered", False) else None
            mine = routing.expert == number
            if sequence is not None:
                mine = mine & real(x_TH, context)[:, None]  # padding must leave no trace in what is read in order
            token, slot = torch.where(mine)
            rows = other(x_TH[token]) if sequence is None else other(x_TH[token], sequence[token])
            if rows is not None:
                y_TH = y_TH.index_add(0, token, (rows * routing.weight[token, slot, None]).to(y_TH.dtype))
        return y_TH

    def finish_step(self) -> None:
        """The optimizer has stepped: correct the bias by what was counted since, and count anew."""
        if self.correction is not None and self.gate.bias is not None:
            self.correction.step(self.gate.bias, gathered(self.tally.count_E), self.gate.pool)
        self.tally.finish_step()

    def _tell(self, x_TH: Tensor, routing: Routing, context: Context) -> None:
        carry(context).routing = routing
        self.tally.add(counted(routing, self.gate.num_experts, context), context)
        if self.training:
            listen(self.balance, self.weight_of, Seen(x_TH, routing, self.gate, self.experts, context))


class Weights(nn.Module):
    """How much each balance term counts: an attribute by the name of each, so that a schedule can move it."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, float(weight))

    def __getitem__(self, name: str) -> float:
        return getattr(self, name)


def listen(terms: Mapping[str, nn.Module], weights: Weights | Mapping[str, float], seen: Seen) -> None:
    """Put the value of each balance term, times its weight, among the carry's losses."""
    for name, term in terms.items():
        carry(seen.context).lose(name, weights[name] * term(seen))


def initialise(layer: nn.Module, std: float = 0.02) -> None:
    """Draw the weights of parts that stand alone; ``std`` is what a model's ``initializer_range`` is.

    In a model this is done when it is built or loaded. Plain torch modules keep what torch gave them.
    """
    for module in layer.modules():
        if hasattr(module, "initialise"):
            module.initialise(std)


def finish_step(model: nn.Module) -> None:
    """Tell every part that keeps something from step to step that the optimizer has stepped."""
    for module in model.modules():
        if hasattr(module, "finish_step"):
            module.finish_step()
