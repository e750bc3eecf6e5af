"""The one contract: a router decides, experts compute.

Shapes by suffix: T tokens, K slots per token, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

PAD = -1
"""Expert id of an unused slot in a :class:`Routing`. Never handed to stock kernels: see :meth:`Routing.stock`."""


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    ``expert`` is int64 [T, K], padded with :data:`PAD` where a token uses fewer slots; ``weight`` is [T, K], final
    (after normalisation and scaling) and 0 where padded; ``logits`` is [T, E] as the router's score stage gave them,
    or None where a router has none to give.
    """

    expert: Tensor
    weight: Tensor
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        if self.expert.shape != self.weight.shape or self.expert.dim() != 2:
            raise ValueError(
                f"routing needs expert and weight of one shape [T, K], got {tuple(self.expert.shape)} "
                f"and {tuple(self.weight.shape)}"
            )

    @property
    def used(self) -> Tensor:
        """bool [T, K]: slots that hold an expert."""
        return self.expert >= 0

    def counts(self, num_experts: int) -> Tensor:
        """int64 [E]: how many (token, slot) pairs each expert received."""
        return torch.bincount(self.expert[self.used], minlength=num_experts)

    def dense(self, num_experts: int) -> Tensor:
        """Combine weights as [T, E]; an expert named twice by one token has its weights summed."""
        weight = torch.zeros(self.expert.shape[0], num_experts, dtype=self.weight.dtype, device=self.weight.device)
        return weight.scatter_add(1, self.expert.clamp(min=0), self.weight * self.used)

    def stock(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """(expert, weight) for transformers' expert kernels, in which an unused slot carries the id ``num_experts``."""
        return torch.where(self.used, self.expert, num_experts), self.weight * self.used

    @classmethod
    def from_dense(cls, weight_TE: Tensor, logits: Tensor | None = None) -> Routing:
        """From combine weights [T, E]: every non-zero entry becomes a slot, heaviest first."""
        width = int((weight_TE != 0).sum(1).max()) if weight_TE.numel() else 0
        order = weight_TE.abs().argsort(dim=1, descending=True, stable=True)[:, :width]
        weight = weight_TE.gather(1, order)
        return cls(torch.where(weight != 0, order, PAD), weight, logits)

    def with_weight(self, weight_TK: Tensor) -> Routing:
        return replace(self, weight=weight_TK)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a router may know beyond the hidden state. All per-token fields are [T]; None means not known."""

    sequence: Tensor | None = None
    position: Tensor | None = None
    prefill: Tensor | None = None
    padding: Tensor | None = None
    modality: Tensor | None = None
    task: Tensor | None = None
    timestep: Tensor | None = None
    input_ids: Tensor | None = None
    previous: Routing | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Router(Protocol):
    """Three stages that can be observed and edited apart, ending in a :class:`Routing`."""

    num_experts: int

    def score(self, x_TH: Tensor, context: Context) -> Tensor:
        """Logits [T, E], before any bias that serves selection only."""
        ...

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        """Expert ids [T, K]; ``bias`` ([E] or [T, E]) is added to what is ranked and leaves the weights alone."""
        ...

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        """Combine weights [T, K] of the selected experts; a :data:`PAD` slot takes no part in any normalisation."""
        ...


@dataclass(frozen=True, kw_only=True)
class RouterEdit:
    """Changes to a router, each attached after one stage; None leaves the stage alone.

    ``after_score``: logits [T, E] -> logits (moves both selection and weights). ``selection_bias``: [E] or [T, E]
    added to what is ranked (moves selection only; -inf forbids an expert). ``after_select``: ids [T, K] -> ids (pin,
    override; PAD drops a slot). ``after_weigh``: Routing -> Routing (zero, rescale, override).
    """

    after_score: Callable[[Tensor, Context], Tensor] | None = None
    selection_bias: Tensor | None = None
    after_select: Callable[[Tensor, Context], Tensor] | None = None
    after_weigh: Callable[[Routing, Context], Routing] | None = None


def route(router: Router, x_TH: Tensor, context: Context | None = None, edit: RouterEdit | None = None) -> Routing:
    """The three stages in order, with an edit applied after each."""
    context, edit = context or Context(), edit or RouterEdit()
    logits = router.score(x_TH, context)
    if edit.after_score:
        logits = edit.after_score(logits, context)
    expert = router.select(logits, context, edit.selection_bias)
    if edit.after_select:
        expert = edit.after_select(expert, context)
    weight = router.weigh(logits, expert, context)
    routing = Routing(expert, weight.masked_fill(expert < 0, 0), logits)
    return edit.after_weigh(routing, context) if edit.after_weigh else routing


class Experts(Protocol):
    """What computes: one output per (token, slot), then a separate combination."""

    num_experts: int

    def run(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Unweighted outputs [T, K, H]; zero where a slot is unused."""
        ...

    def combine(self, slots_TKH: Tensor, routing: Routing) -> Tensor:
        """[T, H]; the weighted sum unless a method says otherwise."""
        ...


def weighted_sum(slots_TKH: Tensor, routing: Routing) -> Tensor:
    """The combination every stock family uses, accumulated in float32 for half-precision inputs."""
    wide = torch.promote_types(slots_TKH.dtype, torch.float32)
    return torch.einsum("tkh,tk->th", slots_TKH.to(wide), routing.weight.to(wide)).to(slots_TKH.dtype)
