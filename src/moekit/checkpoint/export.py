"""The compressed-tensors layout "pack-quantized": what vLLM and transformers read 4- and 8-bit experts from.

A matrix [N, K] becomes ``weight_packed`` int32 [N, K * bits / 32] (signed value + 2^(bits-1), lowest bits first),
``weight_scale`` [N, K / group_size] in the matrix's dtype, and ``weight_shape`` int64 [2]. Symmetric, round to nearest.
Format: the compressed-tensors library, ``compressors/pack_quantized``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moekit.checkpoint.shards import Lazy
from moekit.errors import PlanError

BITS = (4, 8)
FORMAT = "pack-quantized"


def check_shape(name: str, shape: tuple[int, ...], group_size: int) -> None:
    """PlanError unless a matrix can be stored: both engines need whole groups in every row."""
    if len(shape) != 2:
        raise PlanError(
            f"{name} stacks all experts in one tensor {list(shape)}; the compressed-tensors layout is read per expert "
            "only: use --format moekit"
        )
    if shape[1] % group_size or group_size % 8:
        raise PlanError(
            f"{name} has rows of {shape[1]}, not a multiple of group_size {group_size} (itself a multiple of 8): "
            "choose a group_size that divides them, or use --format moekit"
        )


def packed_specs(weight: Lazy, bits: int, group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors that replace ``X.weight``."""
    rows, columns = weight.shape
    return {
        "weight_packed": (torch.int32, (rows, columns * bits // 32)),
        "weight_scale": (weight.dtype, (rows, columns // group_size)),
        "weight_shape": (torch.int64, (2,)),
    }


def pack_weight(weight_NK: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    """Round one matrix to the nearest points of its groups' grids and pack it."""
    rows, columns = weight_NK.shape
    groups = weight_NK.to(torch.float32).reshape(rows, columns // group_size, group_size)
    top = 2 ** (bits - 1)
    # The usual symmetric scale: the range -2^(b-1) .. 2^(b-1)-1 is stretched over the largest magnitude. Rounded to
    # the dtype it is stored in before use, so that nothing is rounded twice; tiny groups keep a scale above zero.
    scale = (groups.abs().amax(-1) / (top - 0.5)).to(weight_NK.dtype)
    scale = scale.clamp(min=torch.finfo(weight_NK.dtype).tiny)
    integers = (groups / scale.to(torch.float32)[..., None]).round().clamp(-top, top - 1)
    unsigned = (integers.reshape(rows, columns) + top).to(torch.uint8).reshape(rows, -1, 8 // bits)
    pairs = unsigned[..., 0] if bits == 8 else unsigned[..., 0] | unsigned[..., 1] << 4
    words = pairs.contiguous().view(torch.int32)  # little-endian: the first value has the lowest bits
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}


def unpack_weight(packed: Mapping[str, Tensor], bits: int) -> Tensor:
    """The inverse, up to rounding: what a loader computes from the three tensors."""
    rows, columns = packed["weight_shape"].tolist()
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    words = packed["weight_packed"][..., None] >> shifts & (2**bits - 1)
    integers = words.reshape(rows, -1)[:, :columns] - 2 ** (bits - 1)
    scale = packed["weight_scale"]
    groups = integers.reshape(rows, scale.shape[1], -1).to(scale.dtype) * scale[..., None]
    return groups.reshape(rows, columns)


def quantization_config(bits: int, group_size: int, ignore: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json; ``ignore`` names every linear module that is left as it was."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,  # vLLM reads it here, transformers falls back to the global one
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
