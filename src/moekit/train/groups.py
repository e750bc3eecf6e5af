"""Which parameters are trained: by what they do in a Mixture-of-Experts model, or by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from moekit.blocks import MoEBlock, blocks
from moekit.errors import OptionError

ROLES = ("router", "experts", "shared", "scales", "norms", "rewrite", "all")


def chosen(model: nn.Module, what: Sequence[str]) -> list[str]:
    """Names of parameters that play one of the roles in ``what``, or match one of its patterns (``*`` and ``?``).

    router: a block's router with its biases; experts: routed experts, factors and scales in their place included;
    shared: shared experts; scales: parameters called so; norms: weights of one axis; rewrite: what changes a routing
    at run time, where a gradient reaches it; all: everything.
    Raises :class:`OptionError` for an entry that names no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for entry in what:
        matched = _role(model, entry) if entry in ROLES else {name for name in names if fnmatchcase(name, entry)}
        if not matched:
            raise OptionError(
                f"'{entry}' names no parameter of {type(model).__name__}: give a role ({', '.join(ROLES)}) or a "
                "pattern of names such as '*.gate.weight'"
            )
        found |= matched
    return [name for name in names if name in found]


def train_only(model: nn.Module, what: Sequence[str]) -> list[str]:
    """Let only the chosen parameters have gradients; returns their names."""
    names = chosen(model, what)
    kept = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    return names


def _role(model: nn.Module, role: str) -> set[str]:
    named = dict(model.named_parameters())
    if role == "all":
        return set(named)
    if role == "norms":
        return {name for name, parameter in named.items() if parameter.dim() == 1 and not name.endswith("bias")}
    if role == "scales":
        return {name for name in named if "scale" in name.rpartition(".")[2]}
    found = {id(p) for block in blocks(model) for p in _parameters(block, role)}
    return {name for name, parameter in named.items() if id(parameter) in found}


def _parameters(block: MoEBlock, role: str) -> Iterator[nn.Parameter]:
    """Where router and experts are one module inside the other, the inner one's parameters are its alone."""
    if role == "shared":
        for shared in block.shared:
            yield from shared.parameters()
        return
    rewrite = getattr(block.experts, "rewrite", None)
    if role == "rewrite":
        yield from rewrite.parameters() if rewrite is not None and rewrite.LEARNS else ()
        return
    own, other = block.router_module, block.experts
    if role == "experts":
        own, other = other, own
    inside = any(module is other for module in own.modules())
    theirs = {id(p) for p in other.parameters()} if inside else set()
    theirs |= {id(p) for p in rewrite.parameters()} if rewrite is not None else set()
    yield from (p for p in own.parameters() if id(p) not in theirs)
