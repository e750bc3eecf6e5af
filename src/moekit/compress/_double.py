"""A small random decoder layer that runs by itself: its experts and everything that is not the block are stand-ins.

Made from the model's skeleton, so that it costs router, norms and shared experts only, whatever the model's size.
Shapes by suffix: T tokens, K slots, H hidden size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekit.blocks import MoEBlock


class NoDoubleError(Exception):
    """Why a layer has no double, or what its double showed to be impossible."""


@dataclass(frozen=True)
class Double:
    """``place``: the path of the stand-in for the experts; ``norms``: modules that hold nothing but vectors [H]."""

    layer: nn.Module
    experts: Experts
    place: str
    norms: Mapping[str, nn.Module]


@dataclass
class Seen:
    """One forward: what came out, and every tensor that went into or came out of a module, kept alive."""

    result: Tensor
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Experts(nn.Module):
    """Stands in for the experts: linear in what they read, and different for every routing."""

    def __init__(self, block: MoEBlock) -> None:
        super().__init__()
        self.read, self.width = block.router.read_call, block.hidden_size
        self.mix_HH, self.scale_H = nn.Parameter(torch.empty(self.width, self.width)), torch.ones(self.width)
        self.seen: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = (*args, *kwargs.values())
        self.seen = x = call[0]
        expert_TK, weight_TK = self.read(call)
        gain_T1 = (weight_TK * (1 + expert_TK)).sum(-1, keepdim=True)
        return ((x.reshape(-1, self.width) * self.scale_H) @ self.mix_HH * gain_T1).view(x.shape)


class Elsewhere(nn.Module):
    """Stands in for attention and the like: some function of what it reads, first of ``count`` things it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        made = x.flip(-1) / 2
        return made if self.count == 1 else (made, *(None,) * (self.count - 1))


def double_of(model: nn.Module, layer: str, block: MoEBlock) -> Double:
    """The double of the decoder layer ``layer`` of ``model``, which holds ``block``; float32, the same every time."""
    if block.experts is block.module:
        raise NoDoubleError("router and experts are one module")
    double = copy.deepcopy(model.get_submodule(layer))
    paths = {module: name for name, module in model.get_submodule(layer).named_modules()}
    owner, _, leaf = paths[block.experts].rpartition(".")
    experts = Experts(block)
    setattr(double.get_submodule(owner), leaf, experts)
    norms = {name: part for name, part in double.named_modules() if _is_norm(part, block.hidden_size)}
    inside = [f"{paths[part]}." for part in (block.module, block.experts, block.router_module)]
    for name, child in list(double.named_children()):
        kept = name in norms or "share" in name or any(path.startswith(f"{name}.") for path in inside)
        if not kept and any(True for _ in child.parameters()):
            setattr(double, name, Elsewhere())
    double.to_empty(device="cpu").float().eval()
    draw = torch.Generator().manual_seed(0)
    for tensor in (*double.parameters(), *double.buffers()):
        if tensor.dim() >= 2:
            tensor.data.normal_(0.0, tensor.shape[-1] ** -0.5, generator=draw)
        elif tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5, generator=draw)
        else:
            tensor.data.zero_()
    return Double(double, experts, paths[block.experts], norms)


def _is_norm(module: nn.Module, width: int) -> bool:
    shapes = [tuple(p.shape) for p in module.parameters()]
    return not any(True for _ in module.children()) and bool(shapes) and set(shapes) == {(width,)}


def run(double: Double, x: Tensor) -> Seen:
    """Families differ in what attention returns: what does not run one way is run the other."""
    for count in (2, 1, 3):
        for part in double.layer.children():
            if isinstance(part, Elsewhere):
                part.count = count
        try:
            return _forward(double.layer, x)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, StopIteration) as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
    raise NoDoubleError(f"its layer does not run by itself ({said})")


@torch.no_grad()
def _forward(layer: nn.Module, x: Tensor) -> Seen:
    seen = Seen(x)

    def watch(name: str) -> Callable[..., None]:
        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.inputs[name] = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if isinstance(output, Tensor):
                seen.outputs[name] = output

        return after

    hooks = [part.register_forward_hook(watch(n), with_kwargs=True) for n, part in layer.named_modules() if n]
    try:
        _, *others = _required(layer)
        made = layer(x, **dict.fromkeys(others))
    finally:
        for hook in hooks:
            hook.remove()
    seen.result = made[0] if isinstance(made, tuple) else made
    return seen


def _required(layer: nn.Module) -> Iterator[str]:
    """Names of what a layer's forward must be given."""
    for parameter in inspect.signature(layer.forward).parameters.values():
        if parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            yield parameter.name
