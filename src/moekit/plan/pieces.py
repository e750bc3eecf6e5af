"""The tensors of one layer's experts, as names, dtypes and shapes now and as numbers when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.bank import SILU_MUL, Activation
from moekit.checkpoint.export import check_shape, pack_weight, packed_specs
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.scheme import REWRITE
from moekit.checkpoint.shards import Lazy, as_lazy
from moekit.errors import PlanError
from moekit.formats import DenseBank, PackedBank
from moekit.kernels.rewrites import allocate_rewrite
from moekit.plan.finite import copied, finite, finite_experts
from moekit.plan.recombine import decoded, recombined_expert
from moekit.plan.target import LayerTarget

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer


class Together:
    """Tensors that are computed at once and handed out one by one, each forgotten as it goes."""

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute = compute
        self._made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if name not in self._made:
            self._made = self._compute()
        return self._made.pop(name)

    def lazy(self, specs: Mapping[str, Tensor]) -> dict[str, Lazy]:
        """``specs``: tensors of the right dtype and shape, on the meta device."""
        return {name: Lazy(t.dtype, tuple(t.shape), partial(self.take, name)) for name, t in specs.items()}


def copied_experts(checkpoint: Checkpoint, target: LayerTarget) -> dict[str, Lazy]:
    """Untouched experts, byte for byte as the source stores them (quantised or not): sliced and renumbered."""
    chosen = [expert.parts[0][0] for expert in target.experts if expert is not None]
    pieces: dict[str, Lazy] = {}
    for tensor in target.layer.expert_tensors:
        for name in tensor.stored.tensors.values():
            if tensor.expert is None:
                pieces[name] = _sliced(checkpoint, name, target.layer.num_experts, chosen)
                continue
            for index, expert in enumerate(chosen):
                if expert == tensor.expert:
                    new = checkpoint.rename_expert(name, index, len(chosen))
                    pieces[new] = copied(checkpoint, name)
    return pieces


def _sliced(checkpoint: Checkpoint, name: str, num_experts: int, chosen: Sequence[int]) -> Lazy:
    if list(chosen) == list(range(num_experts)):
        return copied(checkpoint, name)
    info = checkpoint.tensors[name]
    rows = info.shape[0] // num_experts
    shape = (len(chosen) * rows, *info.shape[1:])
    reader = Reader(checkpoint.path, {name: info})

    def make() -> Tensor:
        out = torch.empty(shape, dtype=info.dtype)
        for index, expert in enumerate(chosen):
            out[index * rows : (index + 1) * rows] = reader.rows(name, expert * rows, (expert + 1) * rows)
        return finite(out, name)

    return Lazy(info.dtype, shape, make)


def dense_experts(checkpoint: Checkpoint, target: LayerTarget) -> dict[str, Lazy]:
    """Experts rebuilt from their parts and laid out as the family does, in the source's floating-point dtype."""
    layer = target.layer

    def compute() -> dict[str, Tensor]:
        return dict(checkpoint.write_bank(layer.name, _assembled(checkpoint, target)))

    return Together(compute).lazy(dense_specs(checkpoint, target))


def dense_specs(checkpoint: Checkpoint, target: LayerTarget) -> dict[str, Tensor]:
    """Names, dtypes and shapes of the family's layout with as many experts as the target has, on the meta device."""
    return dict(checkpoint.write_bank(target.layer.name, _empty(checkpoint, target.layer, len(target.experts), "meta")))


def exported_experts(checkpoint: Checkpoint, target: LayerTarget) -> dict[str, Lazy]:
    """Experts in the compressed-tensors layout.

    Raises:
        PlanError: the family stacks its experts, has biases, or has shapes that the layout cannot hold.
    """
    first = next(expert for expert in target.experts if expert is not None)
    bits, group = first.bits, first.group_size
    if target.layer.shape.biased:
        raise PlanError(
            f"layer {target.layer.name} has expert biases, which the compressed-tensors layout is not read "
            "with; use --format moekit"
        )
    specs: dict[str, Tensor] = {}
    for name, tensor in dense_specs(checkpoint, target).items():
        check_shape(name, tuple(tensor.shape), group)
        for suffix, (dtype, shape) in packed_specs(as_lazy(tensor), bits, group).items():
            specs[name.removesuffix("weight") + suffix] = torch.empty(shape, dtype=dtype, device="meta")

    def compute() -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for index in range(len(target.experts)):
            one = one_expert(checkpoint, target, index)
            for name, weight in checkpoint.write_bank(target.layer.name, one).items():
                renamed = checkpoint.rename_expert(name, index).removesuffix("weight")
                out |= {renamed + suffix: t for suffix, t in pack_weight(weight, bits, group).items()}
        return out

    return Together(compute).lazy(specs)


def own_experts(checkpoint: Checkpoint, target: LayerTarget) -> tuple[dict[str, Lazy], Any]:
    """Experts in moekit's own format, under the experts module; and the empty bank that describes them.

    Taken from the source where it has that format already, from the plan where a method computed them, else rounded
    to packed integers.
    """
    prefix = f"{target.layer.name}.experts."
    if target.style == "select":
        chosen = [expert.parts[0][0] for expert in target.experts if expert is not None]
        empty = checkpoint.stored_bank(target.layer.name, device="meta").select(chosen)

        def made() -> Mapping[str, Tensor]:
            return checkpoint.stored_bank(target.layer.name).select(chosen).tensors()

    elif target.values is not None and not target.values.dense:
        values, activation = target.values, _activation(target.layer.shape.gated)
        whole = values.empty(activation)
        empty = whole if values.chosen is None else whole.select(values.chosen)

        def made() -> Mapping[str, Tensor]:
            return values.bank(activation=activation).tensors()

    else:
        empty = _empty_integers(checkpoint, target)

        def made() -> Mapping[str, Tensor]:
            return _rounded(checkpoint, target)

    together = Together(lambda: {prefix + name: tensor for name, tensor in made().items()})
    return together.lazy({prefix + name: t for name, t in empty.tensors().items()}), empty


def rewrite_pieces(target: LayerTarget) -> dict[str, Lazy]:
    """The tensors of a layer's rewrite that the plan adds, under the experts module."""
    values = target.rewrite
    if values is None:
        return {}
    prefix = target.layer.name + REWRITE
    empty = allocate_rewrite(values.describe, len(target.rows), target.layer.hidden_size, "meta").state_dict()
    return {prefix + n: Lazy(t.dtype, tuple(t.shape), partial(values.tensor, n)) for n, t in empty.items()}


def _empty_integers(checkpoint: Checkpoint, target: LayerTarget) -> PackedBank:
    experts = [expert for expert in target.experts if expert is not None]
    shape = target.layer.shape
    describe = {
        "bits": [expert.bits for expert in experts],
        "group_size": [expert.group_size for expert in experts],
        "dtype": str(_dtype(checkpoint, target.layer, "down")).removeprefix("torch."),
        "gated": shape.gated,
        "bias": shape.biased,
    }
    sizes = (shape.hidden_size, shape.intermediate_size)
    return PackedBank.allocate(describe, *sizes, _activation(shape.gated), device="meta")


def _rounded(checkpoint: Checkpoint, target: LayerTarget) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for index, expert in enumerate(target.experts):
        assert expert is not None
        bank = PackedBank.quantise(one_expert(checkpoint, target, index), expert.bits, expert.group_size)
        out |= {f"{index}.{name.partition('.')[2]}": t for name, t in bank.tensors().items()}
    return out


def one_expert(checkpoint: Checkpoint, target: LayerTarget, index: int) -> DenseBank:
    """One expert of the output as a bank of one, before quantisation; reads only the experts it is made of."""
    layer, stored = target.layer, target.experts[index]
    if stored is None:
        empty = _empty(checkpoint, layer, 1, "cpu")
        return replace(empty, **{name: tensor.zero_() for name, tensor in empty.tensors().items()})
    if target.values is not None:
        chosen = target.values_of[index]
        assert chosen is not None
        bank = target.values.bank([chosen], _activation(layer.shape.gated))
        return decoded(bank, _dtype(checkpoint, layer, "down"))
    sources = sorted({source for source, _ in stored.parts})
    dense = finite_experts(checkpoint, layer, sources, checkpoint.bank(layer.name, sources))
    local = replace(stored, parts=tuple((sources.index(source), c) for source, c in stored.parts))
    return DenseBank.stack([recombined_expert(dense, local)], dense.activation)


def _assembled(checkpoint: Checkpoint, target: LayerTarget) -> DenseBank:
    bank = _empty(checkpoint, target.layer, len(target.experts), "cpu")
    for index in range(len(target.experts)):
        one = one_expert(checkpoint, target, index).tensors()
        for name, tensor in bank.tensors().items():
            tensor[index] = one[name][0]
    return bank


def _empty(checkpoint: Checkpoint, layer: MoELayer, count: int, device: str) -> DenseBank:
    shape = layer.shape
    rows = (2 if shape.gated else 1) * shape.intermediate_size
    sizes: dict[str, tuple[int, ...]] = {
        "gate_up": (count, rows, shape.hidden_size),
        "down": (count, shape.hidden_size, shape.intermediate_size),
    }
    if shape.biased:
        sizes |= {"gate_up_bias": (count, rows), "down_bias": (count, shape.hidden_size)}
    made = {k: torch.empty(size, dtype=_dtype(checkpoint, layer, k), device=device) for k, size in sizes.items()}
    return DenseBank(**made, activation=_activation(shape.gated))


def _dtype(checkpoint: Checkpoint, layer: MoELayer, field: str) -> torch.dtype:
    """The dtype ``checkpoint.bank`` gives one of its tensors: as stored, or what quantised weights decode to."""
    kinds = {"gate_up": ("gate_up", "gate", "up"), "gate_up_bias": ("gate_up_bias", "gate_bias", "up_bias")}
    described = checkpoint.scheme.described(layer.name)
    if described is not None:
        return getattr(torch, described.get("dtype", "bfloat16"))
    tensor = next(t for t in layer.expert_tensors if t.part in kinds.get(field, (field,)))
    if set(tensor.stored.tensors) == {"weight"}:
        return checkpoint.tensors[tensor.name].dtype
    return checkpoint.scheme.dtype


def _activation(gated: bool) -> Activation:
    return SILU_MUL if gated else Activation("ungated", torch.nn.functional.relu, gated=False)


def rebuilding_bytes(checkpoint: Checkpoint, target: LayerTarget, made: Mapping[str, Lazy]) -> int:
    """Most memory that rebuilding a layer's experts takes at once: what is made (twice where it is stacked after it was
    computed), and one expert with its parts, their sum and the rounding in float32."""
    shape = target.layer.shape
    numel = (3 if shape.gated else 2) * shape.hidden_size * shape.intermediate_size
    parts = max(len(expert.parts) for expert in target.experts if expert is not None)
    one = numel * (_dtype(checkpoint, target.layer, "down").itemsize * (parts + 2) + 24)
    stacked = target.style == "dense" and any(tensor.expert is None for tensor in target.layer.expert_tensors)
    return (2 if stacked else 1) * sum(lazy.nbytes for lazy in made.values()) + one
