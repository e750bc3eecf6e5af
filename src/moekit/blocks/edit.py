"""Editing the routing of a live block through hooks: nothing is wrapped or renamed, removal leaves no trace."""

from __future__ import annotations

from collections.abc import MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..contract import Context, RouterEdit, Routing
from .router import FamilyRouter, compose, merge

if TYPE_CHECKING:
    from .block import MoEBlock


class Edit:
    """An edit of one block: a context manager, and a handle once attached."""

    def __init__(self, block: MoEBlock, edit: RouterEdit) -> None:
        self.block, self.edit = block, edit

    def attach(self) -> Edit:
        """Apply the edit until :meth:`remove` is called."""
        _stack(self.block).add(self)
        return self

    def remove(self) -> None:
        """Undo the edit; a second call does nothing."""
        _stack(self.block).discard(self)

    def __enter__(self) -> Edit:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


class _Stack:
    """All edits of one block behind one set of hooks, so that several edits compose."""

    def __init__(self) -> None:
        self.edits: list[Edit] = []
        self.hooks: list[RemovableHandle] = []

    def add(self, edit: Edit) -> None:
        if not self.edits:
            self.hooks = _hook(edit.block, self)
        self.edits.append(edit)

    def discard(self, edit: Edit) -> None:
        self.edits = [other for other in self.edits if other is not edit]
        if not self.edits:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []

    def routing(self, router: FamilyRouter, logits: Tensor, context: Context) -> Routing:
        return compose(router, logits, context, merge([edit.edit for edit in self.edits]))


_STACKS: MutableMapping[nn.Module, _Stack] = WeakKeyDictionary()


def attached(block: MoEBlock) -> RouterEdit:
    """All edits of a block as one; an empty edit if there are none."""
    return merge([edit.edit for edit in _stack(block).edits])


def _stack(block: MoEBlock) -> _Stack:
    return _STACKS.setdefault(block.router_module, _Stack())


def _hook(block: MoEBlock, stack: _Stack) -> list[RemovableHandle]:
    router = block.router
    if router.inline:
        return [block.module.register_forward_hook(_correct(block, stack))]
    if router.at_experts:
        pending: list[Routing] = []

        def decide(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x_TH, context = router.context(args, kwargs)
            pending[:] = [stack.routing(router, router.logits(output, x_TH), context)]

        def substitute(module: nn.Module, args: Any) -> Any:
            return router.write_call(args, pending.pop())

        return [
            block.router_module.register_forward_hook(decide, with_kwargs=True),
            block.experts.register_forward_pre_hook(substitute),
        ]

    def rewrite(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x_TH, context = router.context(args, kwargs)
        return router.write(output, stack.routing(router, router.logits(output, x_TH), context), context)

    return [block.router_module.register_forward_hook(rewrite, with_kwargs=True)]


def _correct(block: MoEBlock, stack: _Stack) -> Any:
    """For a block that routes and computes inline: take its own routed output off and add the edited one."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x_TH = args[0].reshape(-1, args[0].shape[-1])
        logits = block.router.score(x_TH, Context())
        before = block.routed(x_TH, compose(block.router, logits, Context()))
        after = block.routed(x_TH, stack.routing(block.router, logits, Context()))
        hidden, *rest = output
        return (hidden + (after - before).reshape(hidden.shape), *rest)

    return hook
