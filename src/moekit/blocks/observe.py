"""Watching a live block: what reached its experts, which of them, with what weight, and what they returned.

Shapes by suffix: T tokens, H hidden size, K slots, E experts.
"""
# ruff: noqa: N802, N815 (shape suffixes in the names of fields)

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..contract import PAD, Context, Routing, weighted_sum
from .edit import attached

if TYPE_CHECKING:
    from .block import MoEBlock


@dataclass(frozen=True, eq=False)
class Observation:
    """One forward of one block. Valid inside the callback: weights of a streamed layer are gone afterwards.

    ``x_TH`` is what the experts read. ``routing`` names experts only: a slot that went to a skip or identity class, was
    dropped at capacity, or carries weight 0, is PAD; its ``logits`` are [T, E]. ``router_TH`` and ``context`` are what
    the router was given, so that ``compose``-ing the block's router on them repeats the choice. ``residual_TH`` is the
    residual stream entering the block before its norm, or None where no module links the two.
    """

    block: MoEBlock
    x_TH: Tensor
    routing: Routing
    residual_TH: Tensor | None = None
    router_TH: Tensor | None = None
    context: Context = field(default_factory=Context)

    @property
    def layer(self) -> int:
        return self.block.layer

    @cached_property
    def slots_TKH(self) -> Tensor:
        """Unweighted expert outputs, computed when first asked for."""
        with torch.no_grad():
            return self.block.run(self.x_TH, self.routing)

    @cached_property
    def routed_TH(self) -> Tensor:
        """What the experts add, weighted and summed."""
        return weighted_sum(self.slots_TKH, self.routing)


class Observer:
    """Hooks on one block that build an :class:`Observation` and hand it on."""

    def __init__(self, block: MoEBlock, callback: Callable[[Observation], Any]) -> None:
        self.block, self.callback = block, callback
        self._hooks: list[RemovableHandle] = []
        self._seen: dict[str, Any] = {}
        self._produced: deque[tuple[Tensor, Tensor]] = deque(maxlen=64)

    def attach(self) -> Observer:
        """Observe until :meth:`remove` is called."""
        block, router = self.block, self.block.router
        for neighbour in block.neighbours:
            self._hooks.append(neighbour.register_forward_hook(self._remember))
        self._hooks.append(block.module.register_forward_pre_hook(self._enter, with_kwargs=True))
        if router.inline:
            self._hooks.append(block.module.register_forward_hook(self._inline))
            return self
        self._hooks.append(block.router_module.register_forward_hook(self._routed, with_kwargs=True))
        if block.experts is block.module or block.layout.weights_on_input:
            self._hooks.append(block.module.register_forward_hook(self._after_block))
        else:
            self._hooks.append(block.experts.register_forward_hook(self._after_experts, with_kwargs=True))
        return self

    def remove(self) -> None:
        """Stop observing; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._produced.clear()

    def __enter__(self) -> Observer:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    # -- hooks

    def _remember(self, module: nn.Module, args: Any, output: Any) -> None:
        made = output[0] if isinstance(output, tuple) and output else output
        if isinstance(made, Tensor) and args and isinstance(args[0], Tensor):
            self._produced.append((made, args[0]))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._seen = {"block": next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)}

    def _routed(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x_TH, context = self.block.router.context(args, kwargs)
        self._seen |= {"x": x_TH, "context": context, "output": output}

    def _after_experts(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if "output" not in self._seen:
            return  # another block called the experts that both share
        call = (*args, *kwargs.values())
        expert, weight = self.block.router.read_call(call)
        self._emit(call[0].reshape(-1, call[0].shape[-1]), expert, weight)

    def _after_block(self, module: nn.Module, args: Any, output: Any) -> None:
        self._emit(self._seen["x"], *self.block.router.read(self._seen["output"]))

    def _inline(self, module: nn.Module, args: Any, output: Any) -> None:
        x_TH, context = args[0].reshape(-1, args[0].shape[-1]), Context()
        routing = self.block.choose(x_TH, context, attached(self.block))
        self._seen |= {"x": x_TH, "context": context, "logits": routing.logits}
        self._emit(x_TH, routing.expert, routing.weight)

    def _emit(self, x_TH: Tensor, expert: Tensor, weight: Tensor) -> None:
        seen, count = self._seen, self.block.num_experts
        logits = seen["logits"] if "logits" in seen else self.block.router.logits(seen["output"], seen["x"])
        used = (expert >= 0) & (expert < count) & (weight != 0)
        routing = Routing(
            torch.where(used, expert, PAD), weight.masked_fill(~used, 0).detach(), logits[:, :count].detach()
        )
        residual = self._residual((x_TH, seen["block"], seen["x"]))
        self._seen = {}
        self._produced.clear()
        self.callback(Observation(self.block, x_TH.detach(), routing, residual, seen["x"].detach(), seen["context"]))

    def _residual(self, inputs: tuple[Tensor | None, ...]) -> Tensor | None:
        """The input of the module whose output is what the experts, the block or the router read.

        Where no module produced it, the block reads the residual stream itself (norms after, not before). None where
        the producer reads something of another width (several streams).
        """
        for wanted in inputs:
            for made, source in reversed(self._produced):
                if wanted is not None and made.numel() == wanted.numel() and made.data_ptr() == wanted.data_ptr():
                    same = source.shape[-1] == wanted.shape[-1]
                    return source.reshape(-1, source.shape[-1]).detach() if same else None
        read = inputs[1]
        return None if read is None else read.reshape(-1, read.shape[-1]).detach()
