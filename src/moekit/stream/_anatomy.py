"""Where a model can be cut: the modules that run one after another, and who owns the weights outside of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Anatomy:
    """``layers``: the repeated modules, in the order they are built; ``outside``: every other module that owns weights
    itself, called on its own (embeddings, final norm, head); ``around``: owners that contain layers. By module path."""

    layers: dict[str, nn.Module]
    outside: dict[str, nn.Module]
    around: dict[str, nn.Module]


def anatomy(model: nn.Module) -> Anatomy:
    """Cut ``model`` at the elements of its outermost module lists."""
    layers: dict[str, nn.Module] = {}
    _find(model, "", layers)
    outside: dict[str, nn.Module] = {}
    around: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not (module._parameters or module._buffers) or any(_inside(name, layer) for layer in layers):
            continue
        (around if any(_inside(layer, name) for layer in layers) else outside)[name] = module
    return Anatomy(layers, outside, around)


def _inside(name: str, other: str) -> bool:
    return name == other or other == "" or name.startswith(other + ".")


def _find(module: nn.Module, name: str, layers: dict[str, nn.Module]) -> None:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        elements = isinstance(module, nn.ModuleList | nn.ModuleDict) and not isinstance(
            child, nn.ModuleList | nn.ModuleDict
        )
        if elements and any(True for _ in child.parameters()):
            layers[path] = child
        elif not elements:
            _find(child, path, layers)
