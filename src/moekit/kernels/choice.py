"""Which kernel runs, and why not the others: the one place that decides, for running and for explaining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..formats import NestedBank, PackedBank, TernaryBank
from . import fused, integers, panels, planes
from ._layer import Layer
from ._tiles import has_units
from .bank_experts import BankExperts
from .plain import PlainProducts
from .prepare import experts_modules, unfit


@dataclass(frozen=True)
class Choice:
    """One kernel and the reason it does not run, or None for the one that does."""

    kernel: str
    against: str | None


def explain(model_or_experts: nn.Module, tokens: int = 1, training: bool = False) -> str:
    """Which kernel runs ``tokens`` tokens through each experts module, and why not the others; equal layers together.

    ``training`` asks about a pass with gradients. Raises :class:`UnsupportedModelError` where there is no experts
    module of transformers' shared contract.
    """
    texts: dict[str, list[str]] = {}
    for name, module in experts_modules(model_or_experts):
        texts.setdefault(_text(module, tokens, training), []).append(name or type(module).__name__)
    return "\n".join(f"{_names(names)}: {text}" for text, names in texts.items())


def choices(module: Any, training: bool) -> list[Choice]:
    """Every kernel with what speaks against it for this module; exactly one has nothing against it."""
    if isinstance(module, BankExperts):
        return _only("integers", "the experts are stored as packed integers", training)
    prepared = module.__dict__.get("_moekit_prepared")
    if prepared is not None:
        return _only(prepared.products.name, "prepare() packed these experts", training)
    layer = Layer.of_module(module)
    backward = "no gradients are asked for"
    between = "a norm or an activation between the products has parameters" if layer.trainable_between else None
    unsaved = between or ("a norm follows each expert" if layer.finish else None)
    reason = unfit(layer, None)
    offer = f"not prepared: prepare() would not pack it ({reason})" if reason else "not prepared"
    missing = panels.unfit(layer)
    return [
        Choice("integers", "the experts are not stored as integers"),
        Choice("int8", "not prepared with bits=8"),
        Choice("panels", missing or offer),
        Choice("reordered", offer if missing else "not prepared, and prepare() would choose panels"),
        Choice("function", (unsaved if training else backward)),
        Choice("autograd", (None if unsaved else "the function keeps less for the backward") if training else backward),
        Choice("plain", "it has no backward" if training else None),
    ]


_WHAT = {
    "integers": "packed integers, decoded as tokens reach them",
    "int8": "int8 weights, activations rounded to int8",
    "panels": "the weights in panels for compiled kernels, lossless",
    "reordered": "oneDNN's blocked weights, lossless",
    "function": "own backward that keeps only inputs and pre-activations",
    "autograd": "sorted products under plain autograd",
    "plain": "sorted products on the plain weights",
}


def _only(name: str, why: str, training: bool) -> list[Choice]:
    taken = f"{why}: only {name} runs them"
    return [Choice(n, ("it has no backward" if training else None) if n == name else taken) for n in _WHAT]


def _text(module: Any, tokens: int, training: bool) -> str:
    found = choices(module, training)
    chosen = next((c.kernel for c in found if c.against is None), None)
    implementation = getattr(module.config, "_experts_implementation", None)
    lines = [f"{chosen} ({_WHAT[chosen]})" if chosen else "nothing can run this"]
    if not isinstance(module, BankExperts) and implementation != "moekit":
        lines.append(f'  not in use: the model runs experts_implementation="{implementation}"; set it to "moekit"')
    lines += _how(chosen, module, tokens)
    lines += [f"  not {c.kernel}: {c.against}" for c in found if c.against is not None]
    return "\n".join(lines)


def _how(chosen: str | None, module: Any, tokens: int) -> list[str]:
    """How the chosen kernel is computed."""
    if chosen == "integers":
        bank = module.bank
        if isinstance(bank, PackedBank):
            return [_fused(integers.unfit(bank))]
        if isinstance(bank, TernaryBank | NestedBank) and (against := planes.unfit(bank)) is None:
            more = planes.expanded_nbytes(bank) if isinstance(bank, TernaryBank) else 0
            note = [f"  codes are expanded to two bits a weight: {more / 1e6:.1f} MB beside them"] if more else []
            return [_fused(against), *note]
        return [f"  {'compiled by Numba' if integers.jit() else 'by torch: Numba would be faster, pip install numba'}"]
    if chosen in ("int8", "panels"):
        compiled = isinstance(module.__dict__["_moekit_prepared"].products, fused.Fused)
        return [_fused(None if compiled else fused.lacking() or "sizes or a CPU it is not compiled for: FBGEMM")]
    if chosen in ("plain", "function"):
        layer = Layer.of_module(module)
        return [f"  {_plain_path(layer, tokens, module)}", _fused(fused.unfit(layer))]
    return []


def _fused(against: str | None) -> str:
    """A line on the compiled form of a kernel."""
    if against:
        return f"  by torch operations, not fused: {against}"
    seconds = fused.compile_seconds()
    cost = f"compiled in {seconds:.1f} s in this process" if seconds else "the first call compiles for some seconds"
    return f"  fused: a few calls compiled by Numba run all experts ({cost}, kept on disk)"


def _plain_path(layer: Layer, tokens: int, module: Any) -> str:
    slots = next((v for k in ("num_experts_per_tok", "moe_topk", "top_k") if (v := getattr(module.config, k, None))), 1)
    rows = tokens * slots / (layer.num_experts * (1 - (1 - slots / layer.num_experts) ** tokens)) if tokens else 0
    kind = str(layer.down.dtype).removeprefix("torch.")
    how = PlainProducts(layer).path(max(1, round(rows))) if fused.unfit(layer) else "weights read where they lie"
    units = (
        ""
        if layer.down.dtype.itemsize != 2 or layer.down.device.type != "cpu"
        else (f", this CPU has {'' if has_units(layer.down.dtype) else 'no '}{kind} units")
    )
    return f"{tokens} tokens, about {rows:.1f} rows per active expert, {kind} on {layer.down.device}{units}: {how}"


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
