"""Attention heads as experts: some always on, of the others each token takes a few.

Shapes by suffix: B sequences, S positions, T = B S tokens, N heads, R routed heads, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Context, Routing
from ..errors import OptionError
from .attention import Attention
from .balance import balance_term
from .flow import carry, counted, extended
from .layer import Weights, listen
from .parts import Site, Spec
from .router import Router
from .seen import Seen


class HeadRouter(nn.Module):
    """A router among heads, and the balance terms that listen to it (named ``<owner>-<name>`` among the losses).

    Loads go to the carry's ``other_load``, under the owner's name.
    """

    def __init__(
        self, site: Site, router: Mapping[str, Spec] | None, balance: Mapping[str, Any] | None, owner: str
    ) -> None:
        super().__init__()
        self.owner = owner
        self.gate = Router(site, router)
        terms = {f"{owner}-{name}": balance_term(name, spec, site) for name, spec in (balance or {}).items()}
        self.balance = nn.ModuleDict({name: term for name, (_, term) in terms.items()})
        self.weight_of = Weights({name: weight for name, (weight, _) in terms.items()})

    def forward(self, x_TH: Tensor, context: Context) -> Routing:
        context = extended(context, owner=self.owner)
        context = self.gate.entered(x_TH, context)  # balance terms see the same scores, also where they are drawn
        routing = self.gate.routing(self.gate(x_TH, context))
        carry(context).other_load.setdefault(self.owner, []).append(counted(routing, self.gate.num_experts, context))
        if self.training:
            listen(self.balance, self.weight_of, Seen(x_TH, routing, self.gate, None, context))
        return routing


def site_of_heads(config: Any, layer: int, heads: int, k: int) -> Site:
    """What a router among ``heads`` is told; raises :class:`OptionError` where ``k`` of them cannot be chosen."""
    if not 1 <= k <= heads:
        raise OptionError(f"k={k} of {heads} routed attention heads: give 1 to {heads}")
    return Site(
        hidden_size=config.hidden_size,
        intermediate_size=config.head_dim,
        num_experts=heads,
        top_k=k,
        layer=layer,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
    )


class Heads(Attention):
    """``sum_i g_i H_i W_O^i``: the first ``shared`` heads in every token, ``k`` of the others (MoH, equations 5 to 7).

    ``g = a1 softmax(W_s x)`` over shared heads and ``a2 softmax(W_r x)`` for the chosen others, ``[a1, a2] =
    softmax(W_h x)``; without ``two_stage`` (an ablation) both a are 1/2. ``scaled``, as in the released code, makes
    gates 1 on average (the chosen made to sum to k, the shared to their number, both a doubled). Only queries choose:
    every key and value is computed and kept.

    ``by="query"``: the norm of a head's query, over its standard deviation across heads, is the logit; shared heads
    count 1, chosen ones 1 with the gradient of their score. Nothing is learnt for routing (continue-tuning in MoH).

    Raises:
        OptionError: no head left to route, more to choose than there are, an unknown ``by``.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        *,
        k: int,
        shared: int = 0,
        scaled: bool = False,
        two_stage: bool = True,
        by: str = "learnt",
        router: dict[str, Any] | None = None,
        balance: dict[str, Any] | None = None,
        weights: str = "softmax",
    ) -> None:
        super().__init__(config, layer, weights=weights)
        self.num_heads, self.shared, self.scaled, self.by = config.num_attention_heads, shared, scaled, by
        routed = self.num_heads - shared
        if shared < 0 or routed < 1:
            raise OptionError(f"{shared} shared of {self.num_heads} attention heads: leave one to be routed at least")
        if by not in ("learnt", "query"):
            raise OptionError(f"heads chosen by {by!r}: choose learnt or query")
        parts: dict[str, Any] = {"weigh": {"kind": "scores", "normalise": scaled, "scale": float(k) if scaled else 1.0}}
        if by == "query":
            parts = {"score": "offered", "weigh": {"kind": "ones", "straight_through": True}}
        self.router = HeadRouter(site_of_heads(config, layer, routed, k), parts | (router or {}), balance, "attention")
        learnt = by == "learnt"
        self.shared_gate = nn.Linear(config.hidden_size, shared, bias=False) if learnt and shared > 1 else None
        self.mix = nn.Linear(config.hidden_size, 2, bias=False) if learnt and shared and two_stage else None

    def forward(
        self,
        hidden_BSH: Tensor,
        context: Context,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, S, H]."""
        heads = self.heads(hidden_BSH, position_embeddings, attention_mask, past_key_values, **kwargs)
        gate_TN = self.gates(hidden_BSH.reshape(-1, hidden_BSH.shape[-1]), context)
        gate = gate_TN.reshape(*heads.shape[:3], 1).to(heads.dtype)
        return self.o_proj((heads * gate).flatten(2))

    def gates(self, x_TH: Tensor, context: Context) -> Tensor:
        """[T, N]: what each head's output is multiplied by, 0 for heads not chosen."""
        routed_TR = self.router(x_TH, self._offered(x_TH, context)).dense(self.num_heads - self.shared)
        if not self.shared:
            return routed_TR
        shared = torch.ones_like(routed_TR[:, :1]).expand(-1, self.shared)
        if self.shared_gate is not None:
            shared = self.shared_gate(x_TH).softmax(-1, dtype=torch.float32) * (self.shared if self.scaled else 1)
        if self.by == "query":
            return torch.cat((shared, routed_TR), dim=1)
        mix_T2 = routed_TR.new_full((len(x_TH), 2), 0.5)
        if self.mix is not None:
            mix_T2 = self.mix(x_TH).softmax(-1, dtype=torch.float32)
        mix_T2 = mix_T2 * (2 if self.scaled else 1)
        return torch.cat((mix_T2[:, :1] * shared, mix_T2[:, 1:] * routed_TR), dim=1)

    def _offered(self, x_TH: Tensor, context: Context) -> Context:
        if self.by != "query":
            return context
        norm_TN = self.q_proj(x_TH).unflatten(-1, (-1, self.head_dim)).norm(dim=-1)
        spread = norm_TN.std(-1, keepdim=True, unbiased=False).clamp(min=torch.finfo(norm_TN.dtype).tiny)
        return extended(context, offered=(norm_TN / spread)[:, self.shared :])
