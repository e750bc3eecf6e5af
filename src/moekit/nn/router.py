"""A router put together from parts: scorer, activation, selector, weigher.

Shapes by suffix: T tokens, H hidden size, K slots, E choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..contract import PAD, Context, Routing, route
from ..errors import OptionError
from .activations import ACTIVATIONS
from .flow import extended
from .granularity import GRANULARITIES
from .parts import Site, Spec, make
from .scorers import SCORERS
from .selectors import SELECTORS
from .weighers import WEIGHERS

DEFAULTS: dict[str, Spec] = {
    "score": "linear",
    "activation": "softmax",
    "select": "top-k",
    "weigh": "scores",
    "granularity": "token",
}
"""The plain router: linear, softmax, top-k, weights made to sum to 1, token by token."""


class Router(nn.Module):
    """Implements :class:`moekit.contract.Router`; as a module it returns what transformers' routers return.

    ``bias`` [E] (float32, no gradient) is added to what is ranked; it is there if ``corrected`` (loss-free balancing).
    ``pool`` (bool [E] or None) marks the candidates; what is outside has no probability and cannot be chosen.
    """

    def __init__(self, site: Site, parts: Mapping[str, Spec] | None = None, *, corrected: bool = False) -> None:
        super().__init__()
        parts = dict(parts or {})
        for name in parts:
            if name not in DEFAULTS:
                raise OptionError(f"a router has no part {name!r}: it has {', '.join(DEFAULTS)}")
        named = DEFAULTS | parts
        self.num_experts = site.choices
        self.scorer = make("scorer", SCORERS, named["score"], site)
        self.activation = make("activation", ACTIVATIONS, named["activation"], site)
        self.selector = make("selector", SELECTORS, named["select"], site)
        self.weigher = make("weigher", WEIGHERS, named["weigh"], site)
        self.granularity = make("granularity", GRANULARITIES, named["granularity"], site)
        if getattr(self.activation, "signed", False) and getattr(self.weigher, "normalise", False):
            raise OptionError(
                "raw logits have any sign, their sum may be 0 or less and no weights can be shares of it: weigh by "
                "'chosen', or by {kind = \"scores\", normalise = false}"
            )
        if getattr(self.activation, "signed", False) and any(hasattr(m, "of_sum") for m in self.selector.modules()):
            raise OptionError("raw logits have any sign, and this selector takes a share of their sum: activate them")
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(site.choices) if corrected else None)
        self.pool: Tensor | None = None

    @property
    def top_k(self) -> int:
        """The most slots a token uses."""
        return getattr(self.selector, "k", self.num_experts)

    def score(self, x_TH: Tensor, context: Context) -> Tensor:
        """Logits [T, E]; -inf outside the pool. Those of float16 are float32: their product may overflow float16."""
        logits = self.granularity(x_TH, self._logits, context)
        return logits if self.pool is None else logits.masked_fill(~self.pool.to(logits.device), -torch.inf)

    def _logits(self, x_TH: Tensor, context: Context) -> Tensor:
        if x_TH.dtype != torch.float16:
            return self.scorer(x_TH, context)
        held = chain(self.scorer.named_parameters(), self.scorer.named_buffers())
        wide = {name: value.float() for name, value in held if value.dtype == torch.float16}
        return functional_call(self.scorer, wide, (x_TH.float(), context))

    def scores(self, logits_TE: Tensor, context: Context) -> Tensor:
        """What is ranked [T, E], float32 at least; once for all stages of a pass, also where it is drawn at random."""
        memo = context.extra.get("scores", {})
        if memo.get("of") is not logits_TE:
            memo |= {"of": logits_TE, "are": self.activation(logits_TE, context)}
        return memo["are"]

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        scores = self.scores(logits_TE, context).detach()
        own = None if self.bias is None else self.bias
        total = own if bias is None else bias if own is None else own + bias
        barred = logits_TE == -torch.inf
        return self.selector(scores.masked_fill(barred, -torch.inf), context, total)

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        return self.weigher(logits_TE, self.scores(logits_TE, context), expert_TK, context)

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, K], ids [T, K]); an unused slot has the id E and weight 0."""
        routing = route(self, hidden_states, self.entered(hidden_states, context))
        expert, weight = routing.stock(self.num_experts)
        return routing.logits, weight.to(hidden_states.dtype), expert

    def entered(self, x_TH: Tensor, context: Context | None) -> Context:
        """The context of one pass through the three stages, which may look at the hidden states too."""
        context = context or Context()
        return context if context.extra.get("hidden") is x_TH else extended(context, hidden=x_TH, scores={})

    def routing(self, output: tuple[Any, ...]) -> Routing:
        """What :meth:`forward` returned as a :class:`Routing`."""
        logits, weight, expert = output
        return Routing(expert.masked_fill(expert == self.num_experts, PAD), weight, logits)
