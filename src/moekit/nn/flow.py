"""What flows through a model beside the hidden states: a context per layer, and a carry from layer to layer.

The carry is the one mutable thing in a :class:`~moekit.contract.Context`. A layer copies it before it writes, so that a
layer may be run again (recomputation) without counting anything twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..contract import Context, Routing
from ..errors import OptionError


@dataclass
class Carry:
    """``state``: tensors that parts hand to the next layer, by name; ``losses``: auxiliary terms summed over layers,
    already weighted; ``load``: int64 [E] of each MoE layer so far, less padding; ``routing``: of the last of them."""

    state: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    load: list[Tensor] = field(default_factory=list)
    other_load: dict[str, list[Tensor]] = field(default_factory=dict)  # of routers elsewhere, by where they stand
    routing: Routing | None = None

    def copy(self) -> Carry:
        other = {name: list(counts) for name, counts in self.other_load.items()}
        return Carry(dict(self.state), dict(self.losses), list(self.load), other, self.routing)

    def lose(self, name: str, value: Tensor) -> None:
        """Add to the loss called ``name``."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value


def begin(batch: int, length: int, device: torch.device, **fields: Any) -> Context:
    """The context of flat tokens [B * S]: their sequence, and an empty carry; other fields as given.

    Raises :class:`OptionError` for a field of another length.
    """
    for name, value in fields.items():
        if value is not None and len(value) != batch * length:
            raise OptionError(f"{name} is told of {len(value)} tokens, and there are {batch * length}: tell all")
    sequence = torch.arange(batch, device=device).repeat_interleave(length)
    return Context(sequence=sequence, extra={"carry": Carry()}, **fields)


def carry(context: Context) -> Carry:
    """The carry of a context; a throw-away one where none was begun."""
    found = context.extra.get("carry")
    return found if isinstance(found, Carry) else Carry()


def within(context: Context) -> Context:
    """The same context with a carry of its own, for one layer to write to; ``previous`` is the last layer's routing."""
    own = carry(context).copy()
    return replace(context, previous=own.routing, extra={**context.extra, "carry": own})


def by_sequence(values_T: Tensor, context: Context) -> Tensor:
    """[B, S, ..] of [T, ..]: sequences of one length, one after the other; all of it is one where none are told."""
    sequence = context.sequence
    batch = 1 if sequence is None or not len(sequence) else int(sequence[-1]) + 1
    return values_T.reshape(batch, len(values_T) // batch, *values_T.shape[1:])


def real(values_T: Tensor, context: Context) -> Tensor:
    """bool [T]: tokens, not padding."""
    if context.padding is not None:
        return ~context.padding
    return torch.ones(len(values_T), dtype=torch.bool, device=values_T.device)


def counted(routing: Routing, choices: int, context: Context) -> Tensor:
    """int64 [E]: how many slots of tokens, not of padding, each choice got."""
    used = routing.used & real(routing.expert, context)[:, None]
    return torch.bincount(routing.expert[used], minlength=choices)


def gathered(count_E: Tensor) -> Tensor:
    """Counts summed over all ranks, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count_E = count_E.clone()
        torch.distributed.all_reduce(count_E)
    return count_E


def extended(context: Context, **extra: Any) -> Context:
    """The context with more in ``extra``."""
    merged: Mapping[str, Any] = {**context.extra, **extra}
    return replace(context, extra=merged)


def want(expert_TK: Tensor, context: Context) -> None:
    """Keep for this pass through a router what tokens chose before some of it was dropped."""
    context.extra.get("scores", {})["wanted"] = expert_TK


def wanted(routing: Routing, context: Context) -> Tensor:
    """int64 [T, K]: what tokens chose; the routing itself where nothing was dropped."""
    return context.extra.get("scores", {}).get("wanted", routing.expert)


def recomputed() -> bool:
    """Whether this pass is a forward run again inside the backward (checkpointing), which must count nothing twice."""
    return torch._C._current_graph_task_id() != -1
