"""Packing experts once for inference, with the plain copy shared or dropped, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, UnsupportedModelError
from . import panels
from ._drive import forward
from ._layer import Layer, is_decorated
from ._tiles import has_units
from .bank_experts import BankExperts
from .experts import NAME
from .fused import Fused
from .panels import Int8Panels, PanelProducts
from .prepacked import SMALLEST, Int8Products, ReorderedProducts, has_int8, has_reorder

Packed = PanelProducts | Int8Panels | ReorderedProducts | Int8Products


@dataclass
class PrepareReport:
    """What :func:`prepare` did: bytes of the experts before and after, and why any layer was left as it was."""

    packed: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    bits: int | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    kept_plain: bool = False

    def __str__(self) -> str:
        how = "int8, lossy" if self.bits == 8 else "lossless"
        fate = "kept beside it" if self.kept_plain else "dropped"
        sizes = f"{self.bytes_before / 1e9:.1f} -> {self.bytes_after / 1e9:.1f} GB"
        lines = [f"{len(self.packed)} experts modules packed ({how}), plain copy {fate}, {sizes}"]
        reasons: dict[str, int] = {}
        for reason in self.shared.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        return "\n".join([*lines, *(f"{n} left on the plain copy (shared): {reason}" for reason, n in reasons.items())])


class Prepared:
    """The packed products of one experts module; what :func:`experts_forward` calls instead of the plain weights."""

    def __init__(self, products: Packed, dropped: dict[str, nn.Parameter]) -> None:
        self.products = products
        self.dropped = {name: p.requires_grad for name, p in dropped.items()}
        self.hook: Any = None

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if x_TH.device.type != "cpu":
            raise OptionError(f"experts prepared for the CPU got an input on {x_TH.device}: call moekit.restore first")
        if torch.is_grad_enabled() and (x_TH.requires_grad or weight_TK.requires_grad):
            raise OptionError(
                "prepared experts have no backward: call the model under torch.no_grad(), or moekit.restore(model)"
            )
        if isinstance(self.products, Fused):
            return self.products.forward(x_TH, index_TK, weight_TK)
        return forward(self.products, x_TH, index_TK, weight_TK)


def prepare(model_or_experts: nn.Module, bits: int | None = None, keep: bool = False) -> PrepareReport:
    """Pack the experts of a model, or one experts module, for inference on this CPU, and switch to moekit's kernels.

    ``bits`` None is lossless; 8 rounds weights and activations to int8. The plain copy is dropped where a packed one
    takes its place (``keep`` holds both), and shared where packing would gain nothing. A lossless packing is undone
    bit for bit by :func:`restore`; saving a model whose plain copy was dropped raises until then.

    Raises:
        OptionError: ``bits`` is neither None nor 8, or nothing on this machine runs int8.
        UnsupportedModelError: nothing here is an experts module of transformers' shared contract.
    """
    if bits not in (None, 8):
        raise OptionError(f"bits={bits} cannot be prepared: use None (lossless) or 8 (int8)")
    if bits == 8 and not (has_int8() or panels.has_int8()):
        raise OptionError("this build of torch has no FBGEMM int8 operators: prepare with bits=None")
    found = list(experts_modules(model_or_experts))
    report = PrepareReport(bits=bits, kept_plain=keep)
    for name, module in found:
        if isinstance(module, BankExperts):
            report.shared[name] = "already stored as they run"
            continue
        _set_implementation(module)
        if "_moekit_prepared" in module.__dict__:
            report.shared[name] = "already prepared"
            continue
        layer, before = Layer.of_module(module), _nbytes(module)
        reason = unfit(layer, bits)
        report.bytes_before += before
        if reason:
            report.shared[name] = reason
            report.bytes_after += before
            continue
        products = _packed(layer, bits)
        del layer
        _install(module, products, keep)
        report.packed.append(name)
        report.bytes_after += products.nbytes + _nbytes(module)
    return report


def restore(model_or_experts: nn.Module) -> None:
    """Undo :func:`prepare`: plain weights back where they were, bit for bit.

    Raises :class:`OptionError` where they were dropped for int8, before anything is changed.
    """
    modules = [m for m in model_or_experts.modules() if "_moekit_prepared" in m.__dict__]
    for module in modules:
        prepared = module.__dict__["_moekit_prepared"]
        if prepared.dropped and prepared.products.bits == 8:
            raise OptionError("the plain weights were dropped for int8 and cannot come back: load the model again")
    for module in modules:
        prepared = module.__dict__.pop("_moekit_prepared")
        if not prepared.dropped:
            continue
        prepared.hook.remove()
        for name, weight in zip(_stacked(module), prepared.products.plain(), strict=True):
            requires_grad = prepared.dropped[name]
            weight = weight.transpose(1, 2) if module.is_transposed else weight
            module.register_parameter(name, nn.Parameter(weight.contiguous(), requires_grad))


def experts_modules(model_or_experts: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every experts module that moekit's kernels run. Raises where there is none."""
    found = [(name, m) for name, m in model_or_experts.named_modules() if is_decorated(m) or isinstance(m, BankExperts)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model_or_experts).__name__} holds no experts module of transformers' shared contract: "
            "moekit's kernels have nothing to run here"
        )
    yield from found


def unfit(layer: Layer, bits: int | None) -> str | None:
    """Why a layer is better left on its plain weights, or None."""
    down = layer.down
    if down.device.type != "cpu":
        return f"packed layouts are for the CPU, the weights are on {down.device.type}"
    if bits == 8 or panels.unfit(layer) is None:
        return None
    if down.dtype in (torch.bfloat16, torch.float16) and not has_units(down.dtype):
        return f"this CPU has no {str(down.dtype)[6:]} units: weights are converted tile by tile as they are used"
    if down.dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN has no packed layout for {str(down.dtype)[6:]}"
    if not has_reorder():
        return "this build of torch has no oneDNN packing operators"
    if down[0].numel() < SMALLEST:
        return f"an expert of {down[0].numel()} weights per matrix is too small to gain from packing"
    return None


def _packed(layer: Layer, bits: int | None) -> Packed:
    """The best layout there is on this machine."""
    compiled = panels.unfit(layer) is None
    if bits == 8:
        return Int8Panels(layer) if compiled and panels.has_int8() else Int8Products(layer)
    return PanelProducts(layer) if compiled else ReorderedProducts(layer)


def _install(module: Any, products: Packed, keep: bool) -> None:
    names = [] if keep else _stacked(module)
    prepared = Prepared(products, {name: getattr(module, name) for name in names})
    for name in names:
        module.register_parameter(name, None)
    if names:
        prepared.hook = module.register_state_dict_pre_hook(_refuse)
    module.__dict__["_moekit_prepared"] = prepared


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise OptionError(
        f"the plain weights of {prefix.rstrip('.') or type(module).__name__} were dropped by prepare(): "
        "call moekit.restore(model) before saving"
    )


def _stacked(module: Any) -> list[str]:
    return ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]


def _nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def _set_implementation(module: Any) -> None:
    # some families hand each experts module a copy of the config, which the model's own setter does not reach
    module.config._experts_implementation = NAME
