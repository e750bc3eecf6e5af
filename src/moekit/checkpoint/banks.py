"""One layer's experts between their layout on disk and the canonical bank, both ways.

Shapes by suffix: E experts, G = 2I if gated else I, I intermediate size, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.bank import Activation, ExpertWeights
from moekit.checkpoint import decode
from moekit.checkpoint.layers import ExpertTensor, MoELayer
from moekit.checkpoint.names import EXPERT_INDEX
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.scheme import Scheme, stored_bank
from moekit.checkpoint.stock import stock_tensors
from moekit.checkpoint.storage import Stored
from moekit.errors import CheckpointError, OptionError, UnsupportedModelError
from moekit.formats import DenseBank


def matrix(reader: Reader, scheme: Scheme, layer: MoELayer, tensor: ExpertTensor, expert: int) -> Tensor:
    """One expert's share of a tensor as a matrix [out, in] (or a bias [out]), decoded; gate and up as stored."""
    parts = {role: own(reader, name, tensor, expert) for role, name in tensor.stored.tensors.items()}
    columns = layer.intermediate_size if tensor.part == "down" else layer.hidden_size
    value = decode_parts(parts, scheme, columns)
    return value.mT if tensor.transposed else value


def decode_parts(parts: Mapping[str, Tensor], scheme: Scheme, columns: int) -> Tensor:
    """The matrix that a group of stored tensors stands for, by role (see :mod:`storage`)."""
    if parts.keys() - {"input_scale", "input_global_scale"} == {"weight"}:
        return parts["weight"]
    if "g_idx" in parts or "global_scale" in parts:
        raise UnsupportedModelError("weights with activation ordering or global scales (NVFP4) are not read yet")
    if "scale_inv" in parts and parts["scale_inv"].dim() >= 2:
        value = decode.blocks(parts["weight"], parts["scale_inv"], scheme.block)
    elif "blocks" in parts:
        value = decode.mxfp4(parts["blocks"], parts["scales"])
    elif "packed" in parts:
        bits = parts["packed"].shape[-1] * 32 // columns
        value = decode.packed_integers(parts["packed"], parts["scale"], columns, bits, parts.get("zero_point"))
    else:
        scale = parts.get("scale", parts.get("scale_inv"))
        if scale is None:
            raise UnsupportedModelError(f"a weight stored as {', '.join(sorted(parts))} is not understood")
        value = decode.scaled(parts["weight"], scale, parts.get("zero_point"))
    return value.to(scheme.dtype)


def own(reader: Reader, name: str, tensor: ExpertTensor, expert: int) -> Tensor:
    """An expert's rows of one tensor, or all of a tensor that is one expert's."""
    if tensor.expert is not None:
        return reader.read(name)
    shape = reader.info(name).shape
    rows = reader.rows(name, expert * tensor.rows, (expert + 1) * tensor.rows)
    return rows if len(shape) == 2 and not tensor.part.endswith("_bias") else rows[0]


def read_bank(
    reader: Reader,
    scheme: Scheme,
    layer: MoELayer,
    activation: Activation,
    experts: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> DenseBank:
    """The named experts (all if None), in that order, as a canonical bank; only their bytes are read."""
    chosen = list(range(layer.num_experts)) if experts is None else list(experts)
    check_experts(layer, chosen)
    if any(tensor.canonical for tensor in layer.expert_tensors):
        bank = stored_bank(reader, scheme, layer, activation, chosen)
        plain = (bank.expert(e) for e in chosen)
        cast = [ExpertWeights(*(t if t is None or dtype is None else t.to(dtype) for t in one)) for one in plain]
        return DenseBank.stack(cast, activation)
    check_whole(layer)
    by_expert: dict[int | None, list[ExpertTensor]] = {}
    for tensor in layer.expert_tensors:
        by_expert.setdefault(tensor.expert, []).append(tensor)
    made: dict[str, Tensor] = {}
    for place, expert in enumerate(chosen):
        for tensor in (*by_expert.get(None, ()), *by_expert.get(expert, ())):
            value = matrix(reader, scheme, layer, tensor, expert)
            _put(made, layer, tensor, value, place, len(chosen), dtype or value.dtype)
    return DenseBank(**made, activation=activation)


def _put(
    made: dict[str, Tensor],
    layer: MoELayer,
    tensor: ExpertTensor,
    value: Tensor,
    place: int,
    count: int,
    dtype: torch.dtype,
) -> None:
    key = _field(tensor.part)
    inner = layer.intermediate_size
    if key not in made:
        rows = (2 * inner if layer.shape.gated else inner) if key.startswith("gate_up") else layer.hidden_size
        made[key] = torch.empty(count, rows, *value.shape[1:], dtype=dtype)
    target = made[key][place]
    for own_rows, source in _halves(tensor, layer):
        target[own_rows].copy_(value[source])


def _field(part: str) -> str:
    """The bank's tensor that a part belongs to."""
    bias = "_bias" if part.endswith("_bias") else ""
    return "down" + bias if part.startswith("down") else "gate_up" + bias


def _halves(tensor: ExpertTensor, layer: MoELayer) -> Iterator[tuple[slice, slice]]:
    """Where rows of the stored matrix lie in the canonical one: (canonical rows, stored rows)."""
    inner, part = layer.intermediate_size, tensor.part.removesuffix("_bias")
    if part == "gate_up" and tensor.interleaved:
        yield slice(0, inner), slice(0, None, 2)
        yield slice(inner, None), slice(1, None, 2)
    elif part == "gate":
        yield slice(0, inner), slice(None)
    elif part == "up" and layer.shape.gated:
        yield slice(inner, None), slice(None)
    else:
        yield slice(None), slice(None)


def plain(
    reader: Reader, scheme: Scheme, stored: Stored, tensor: ExpertTensor | None, dtype: torch.dtype | None
) -> Tensor:
    """One whole weight, decoded, in the layout the family has without quantisation."""
    parts = {role: reader.read(name) for role, name in stored.tensors.items()}
    if tensor is not None and tensor.canonical:
        raise CheckpointError(f"{stored.name} is packed by moekit: read it through its layer's bank")
    columns = int(parts["shape"][-1]) if "shape" in parts else 0
    value = decode_parts(parts, scheme, columns)
    if tensor is not None and tensor.plain_transposed != tensor.transposed:
        value = value.mT.contiguous()
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def write_bank(reader: Reader, layer: MoELayer, bank: DenseBank, model: PreTrainedModel) -> dict[str, Tensor]:
    """The inverse of :func:`read_bank` for any number of experts: the family's plain names and layout.

    A quantised source is written unquantised, under the names and in the layout the family has without quantisation.
    """
    if any(tensor.canonical for tensor in layer.expert_tensors):
        return stock_tensors(model, layer.shape, bank)
    templates = [t for t in layer.expert_tensors if t.expert in (None, layer.expert_tensors[0].expert)]
    made: dict[str, Tensor] = {}
    for tensor in templates:
        values = [_stored_matrix(bank, layer, tensor, expert) for expert in range(bank.num_experts)]
        if tensor.expert is None:
            made[tensor.stored.name] = _stack(reader, tensor, values)
        else:
            for expert, value in enumerate(values):
                made[rename(tensor, expert, bank.num_experts)] = value.contiguous()
    return made


def _stored_matrix(bank: DenseBank, layer: MoELayer, tensor: ExpertTensor, expert: int) -> Tensor:
    whole = bank.tensors()[_field(tensor.part)][expert]
    halves = list(_halves(tensor, layer))
    if len(halves) == 1:
        value = whole[halves[0][0]]
    else:
        value = torch.empty_like(whole)
        for rows, source in halves:
            value[source] = whole[rows]
    return value.mT if tensor.plain_transposed else value


def _stack(reader: Reader, tensor: ExpertTensor, values: list[Tensor]) -> Tensor:
    flat = len(reader.info(tensor.name).shape) == 2 and not tensor.part.endswith("_bias")
    return torch.cat(values) if flat else torch.stack(values)


def rename(tensor: ExpertTensor, index: int, count: int | None = None) -> str:
    """The plain name of this tensor for expert ``index`` of ``count``."""
    return rename_index(tensor.stored.name, index + tensor.run * (count or 0))


def rename_index(name: str, index: int) -> str:
    if EXPERT_INDEX.search(name) is None:
        raise CheckpointError(f"{name} is not one expert's tensor: it has no expert number to change")
    return EXPERT_INDEX.sub(rf"\g<1>{index}", name, count=1)


def nbytes(reader: Reader, layer: MoELayer) -> int:
    """Bytes of one expert of a layer on disk (the mean, where experts differ)."""
    total = sum(reader.info(name).nbytes for t in layer.expert_tensors for name in t.stored.tensors.values())
    return math.ceil(total / layer.num_experts)


def check_experts(layer: MoELayer, experts: Sequence[int]) -> None:
    wrong = [e for e in experts if not 0 <= e < layer.num_experts]
    if wrong:
        raise OptionError(f"expert {wrong[0]} does not exist: {layer.name} has experts 0 to {layer.num_experts - 1}")


def check_whole(layer: MoELayer) -> None:
    """That every expert has every part.

    Raises:
        CheckpointError: naming the layer, the expert and the part.
    """
    parts: dict[int | None, set[str]] = {}
    for tensor in layer.expert_tensors:
        parts.setdefault(tensor.expert, set()).add(tensor.part)
    stacked = parts.pop(None, set())
    first = ("gate", "up") if layer.shape.gated else ("up",)
    for expert in range(layer.num_experts):
        found = stacked | parts.get(expert, set())
        needed = ("down",) if "gate_up" in found else (*first, "down")
        missing = [part for part in needed if part not in found]
        if missing:
            raise CheckpointError(f"{layer.name}: expert {expert} has no {missing[0]} weights on disk")
