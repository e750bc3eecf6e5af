"""Finding every MoE block of a live model by what its modules look like, with a short table for those that differ."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ._counts import num_experts
from ._layout import AttentionPair, Flattened, Layout, Modules, Packed, Pair, SingleUnits, Stacked, TransposedOnInput
from .block import MoEBlock
from .deviants import router_for
from .families import UNSUPPORTED

LAYOUTS: dict[str, type[Layout]] = {
    "Llama4TextExperts": TransposedOnInput,
    "DbrxExperts": Flattened,
    "JetMoeMoE": Pair,
    "JetMoeMoA": AttentionPair,
    "SwitchTransformersExperts": Modules,
    "DogeCDMoE": SingleUnits,
    "BankExperts": Packed,
}
"""Experts modules that are not stacked as transformers' shared contract has them, by class name."""

_WHOLE_BLOCKS = {"JetMoeMoE", "JetMoeMoA", "DogeCDMoE"}
"""Classes that are experts and block in one."""

_ROUTER_NAMES = ("gate", "router", "router_gate")


def blocks(model: nn.Module, *, attention: bool = False, shared: bool = False) -> list[MoEBlock]:
    """Every MoE feed-forward block of ``model``, in layer order; with ``attention``, its attention experts too.

    ``shared``, for those who change nothing: also where several routers choose from one bank of experts (layers that
    share it, passes over one layer), a block for each. What is done to the experts of one is done to all of them.

    Raises :class:`UnsupportedModelError` for a dense model, a family in ``UNSUPPORTED``, several routers over one bank
    unless ``shared``, or a router that no recipe and no entry of ``deviants`` describes.
    """
    family = type(model).__module__.split(".")[-2] if "." in type(model).__module__ else ""
    if family in UNSUPPORTED:
        raise UnsupportedModelError(f"{family} is not supported: {UNSUPPORTED[family]}")
    if not shared:
        _check_own(model)
    found = [_block(model, name, layout) for name, layout in _experts(model) if attention or not layout.attention]
    if shared:
        found = _with_sharers(model, found)
    if not found:
        config = getattr(model, "config", None)
        count = config is not None and num_experts(config)
        raise UnsupportedModelError(
            f"{type(model).__name__} says it has {count} experts, but no module holds them in a form moekit knows"
            if count
            else f"{type(model).__name__} is a dense model: it has no Mixture-of-Experts block to work on"
        )
    return found


def _check_own(model: nn.Module) -> None:
    """Views edit one layer at a time, which would change other layers where several hold the same experts."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        down = getattr(module, "down_proj", None)
        if isinstance(down, Tensor) and down.dim() == 3:
            holders.setdefault(id(module), []).append(name)
    shared = next((names for names in holders.values() if len(names) > 1), None)
    if shared is not None:
        raise UnsupportedModelError(
            f"{shared[0]} and {shared[1]} are one bank of experts: layers that share experts can be trained, run and "
            "looked at, but not changed one by one"
        )
    for name, module in model.named_modules():
        used = getattr(module, "experts", None)
        if id(used) in holders and "experts" not in module._modules:
            raise UnsupportedModelError(
                f"{name} routes to {holders[id(used)][0]} too: layers with several routers can be trained, run and "
                "looked at, but not changed by one of them"
            )


def _experts(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    for name, module in model.named_modules():
        named = next((LAYOUTS[c.__name__] for c in type(module).__mro__ if c.__name__ in LAYOUTS), None)
        down = getattr(module, "down_proj", None)
        if named is not None:
            yield name, named(module, _count(module))
        elif "shared" in name.rpartition(".")[2]:
            continue
        elif isinstance(down, Tensor) and down.dim() == 3 and _router_of(_parent(model, name)[1]) is not None:
            yield name, Stacked(module, down.shape[0])


def _with_sharers(model: nn.Module, found: list[MoEBlock]) -> list[MoEBlock]:
    """These blocks and one for every other module that calls the experts of one of them, in the model's order."""
    owners = {id(block.experts): block for block in found}
    every = {block.name: block for block in found}
    for path, module in model.named_modules():
        owner = owners.get(id(getattr(module, "experts", None)))
        if owner is not None and module is not owner.module and _router_of(module) is not None:
            every[path] = _at(model, path, module, owner.layout)
    return [every[path] for path, _ in model.named_modules() if path in every]


def _count(module: nn.Module) -> int:
    """The number of experts, from the tensors rather than from what the module says."""
    if isinstance(module, nn.ModuleDict):
        return len(module)
    for attribute in ("num_experts", "num_routed_experts"):
        if isinstance(found := getattr(module, attribute, None), int):
            return found
    return int(next(p.shape[0] for p in module.parameters() if p.dim() == 3))


def _parent(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The block a module of experts belongs to: its parent, or itself where it is both."""
    module = model.get_submodule(name)
    if any(c.__name__ in _WHOLE_BLOCKS for c in type(module).__mro__):
        return name, module
    path = name.rpartition(".")[0]
    return path, model.get_submodule(path)


def _router_of(parent: nn.Module) -> nn.Module | None:
    children = dict(parent.named_children())
    named = [children[n] for n in _ROUTER_NAMES if n in children]
    alike = [c for c in children.values() if type(c).__name__.endswith(("Router", "Gate", "Gating"))]
    return next(iter(named + alike), None)


def _block(model: nn.Module, name: str, layout: Layout) -> MoEBlock:
    path, parent = _parent(model, name)
    if _router_of(parent) is None:
        raise UnsupportedModelError(
            f"{name} ({type(layout.module).__name__}) has experts but no router beside it: expected a sibling called "
            f"{' or '.join(_ROUTER_NAMES)}"
        )
    return _at(model, path, parent, layout)


def _at(model: nn.Module, path: str, parent: nn.Module, layout: Layout) -> MoEBlock:
    """The block of the module at ``path``, which holds a router."""
    gate = _router_of(parent)
    assert gate is not None
    return MoEBlock(
        path,
        next((int(part) for part in path.split(".") if part.isdigit()), 0),
        parent,
        layout.module,
        layout,
        router_for(gate, parent, layout.num_experts),
        shared=tuple(_shared(model, path)),
        neighbours=tuple(_neighbours(model, path)),
    )


def _ancestors(path: str) -> Iterator[str]:
    """The block's path and those above it, up to the decoder layer (the first numbered module)."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    for end in range(len(parts), first, -1):
        yield ".".join(parts[:end])


def _shared(model: nn.Module, path: str) -> Iterator[nn.Module]:
    for above in _ancestors(path):
        for name, child in model.get_submodule(above).named_children():
            if "shared" in name:
                yield child


def _neighbours(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around the block, within its layer, one of which (a norm) may have produced its input."""
    *_, layer = _ancestors(path)
    for name, module in model.get_submodule(layer).named_modules():
        full = f"{layer}.{name}"
        within = full.startswith(path + ".") and path != layer
        around = not name or path == full or path.startswith(full + ".")
        if not within and not around and not isinstance(module, nn.Linear | nn.Embedding | nn.ModuleList):
            yield module
