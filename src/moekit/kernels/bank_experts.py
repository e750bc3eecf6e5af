"""An experts module on a bank in any stored format, in place of a family's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..bank import Activation, ExpertBank
from ..errors import OptionError, UnsupportedModelError
from ..formats import allocate, with_tensors
from ._arrivals import Arrivals
from ._drive import Products, forward
from ._layer import activation_of, check_decorated, in_its_dtype
from .rewrites import Rewrite, allocate_rewrite
from .run import products_of
from .scaled import scaled


class BankExperts(nn.Module):
    """Called as transformers calls experts: ``(hidden [T, H], index [T, K], weights [T, K]) -> [T, H]``.

    ``slots[s]`` is the stored expert that router row s uses; rows may share one, and -1 marks a row that is never
    selected (its pairs add nothing). None means row s uses expert s. ``rewrite`` changes the routing before the
    experts run. Inference only.
    ``serve``, if set, computes in place of the module's own parameters; it is given stored experts.
    The parameters are named as on disk (``N.gate_up.qweight`` ...) and keep their dtypes under ``.to(dtype)``.
    """

    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self, bank: ExpertBank, slots: Sequence[int] | None = None, rewrite: Rewrite | None = None) -> None:
        super().__init__()
        _check_slots(slots, bank.num_experts)
        self.slots = None if slots is None else list(slots)
        self.num_experts = bank.num_experts if slots is None else len(slots)
        self.hidden_dim, self.intermediate_dim = bank.hidden_size, bank.intermediate_size
        self.has_gate = bank.activation.gated
        self.has_bias = any(name.endswith(".bias") for name in bank.tensors())
        self.config: Any = None
        self.rewrite = rewrite
        self._empty = with_tensors(bank, {n: t.to("meta") for n, t in bank.tensors().items()})
        self._products: Products | None = None
        self.serve: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)
        for name, tensor in bank.tensors().items():
            expert, part, leaf = name.split(".")
            holder = _child(_child(self, expert), part)
            holder.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    @classmethod
    def like(
        cls,
        experts: nn.Module,
        describe: Mapping[str, Any],
        slots: Sequence[int] | None = None,
        rewrite: Mapping[str, Any] | None = None,
    ) -> Self:
        """Empty, of the sizes and the activation of a family's experts module, on its device (meta included).

        ``describe`` is what the bank's ``describe()`` gave, ``rewrite`` what the rewrite's did. Raises
        :class:`OptionError` where they contradict the module's biases or gate, :class:`UnsupportedModelError` on a
        module outside the shared contract.
        """
        check_decorated(experts)
        module: Any = experts
        for what, has in (("gated", module.has_gate), ("bias", module.has_bias)):
            if bool(describe.get(what, what == "gated")) != has:
                raise OptionError(
                    f"the stored experts say {what}={not has}, but {type(experts).__name__} has {what}={has}: "
                    "they belong to another model"
                )
        down = module.down_proj
        inner, hidden = down.shape[1:] if module.is_transposed else (down.shape[2], down.shape[1])
        activation = _canonical_activation(_shell(module))
        bank = allocate(describe, hidden, inner, activation, down.device)
        rows = bank.num_experts if slots is None else len(slots)
        self = cls(bank, slots, None if rewrite is None else allocate_rewrite(rewrite, rows, hidden, down.device))
        self.config = module.config
        if module.has_post_expert_norm:
            self.has_post_expert_norm, self.post_expert_norm = True, module.post_expert_norm
        if isinstance(getattr(module, "act_fn", None), nn.Module):
            self.act_fn = module.act_fn
        self.train(experts.training)
        return self

    @property
    def bank(self) -> ExpertBank:
        """The stored experts, as views of the parameters."""
        return with_tensors(self._empty, {n: self.get_parameter(n).data for n in self._empty.tensors()})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise OptionError("stored experts have no backward: call the model under torch.no_grad()")
        scales = None
        if self.rewrite is not None:
            if self.rewrite.INSIDE:
                scales = self.rewrite.scales(top_k_index, top_k_weights)
            hidden_states, top_k_index, top_k_weights = self.rewrite(hidden_states, top_k_index, top_k_weights)
        stored = self._stored(top_k_index)
        if self.serve is not None:
            return self.serve(hidden_states, stored, top_k_weights)
        if self._products is None:
            self._products = self._on(self.bank)
        if scales is not None:
            return scaled(self._products, hidden_states, stored, top_k_weights, scales)
        return forward(self._products, hidden_states, stored, top_k_weights)

    def arriving(self, bank: ExpertBank) -> Callable[[Tensor, Tensor, Tensor, Arrivals], Tensor]:
        """This module's experts on another bank of the same form, whose weights come while they are computed:
        (hidden [T, H], stored experts [T, K], weights [T, K], arrivals) -> [T, H].

        Raises :class:`UnsupportedModelError` where a rewrite scales what the matrices read one by one."""
        if self.rewrite is not None and self.rewrite.INSIDE:
            raise UnsupportedModelError(
                f"experts whose matrices read inputs scaled apart ({self.rewrite.KIND}) cannot be paged: run this "
                "model in memory"
            )
        products = self._on(bank)
        return lambda x_TH, index_TK, weight_TK, arrivals: forward(
            products, x_TH, index_TK, weight_TK, arrivals=arrivals
        )

    def _on(self, bank: ExpertBank) -> Products:
        finish = in_its_dtype(self.post_expert_norm) if self.has_post_expert_norm else None
        return products_of(bank if self.rewrite is None else self.rewrite.runs(bank), finish)

    def _stored(self, index_TK: Tensor) -> Tensor:
        """Router rows -> stored experts; a sentinel beyond the last row stays one."""
        if self.slots is None:
            return index_TK
        table = torch.tensor([*self.slots, -1], device=index_TK.device)
        known = (index_TK >= 0) & (index_TK < self.num_experts)
        return table[torch.where(known, index_TK, self.num_experts)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves between devices; a cast of the model (``.to(torch.float32)``) must not touch the grids."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        self._products = None
        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_experts} rows, {self._empty.num_experts} experts stored as {type(self._empty).__name__}"


def _child(parent: nn.Module, name: str) -> nn.Module:
    if name not in parent._modules:
        parent.add_module(name, nn.Module())
    return parent.get_submodule(name)


def _forget(module: Any, _: Any) -> None:
    module._products = None


def _shell(module: nn.Module) -> nn.Module:
    """The module without its weights, so that its activation does not keep them in memory."""
    shell = copy.copy(module)
    shell._parameters = {}
    return shell


def _check_slots(slots: Sequence[int] | None, stored: int) -> None:
    wrong = [s for s in slots or () if not -1 <= s < stored]
    if wrong:
        raise OptionError(f"slot {wrong[0]} names no stored expert: there are 0 to {stored - 1}, and -1 for none")


def _canonical_activation(module: Any) -> Activation:
    """The module's activation on gate rows first, up rows second, which is how banks are stored."""
    activation = activation_of(module)
    if module.is_concatenated or not module.has_gate:
        return activation

    def from_halves(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(torch.stack([gate, up], dim=-1).flatten(-2))

    return Activation(activation.name, from_halves)
