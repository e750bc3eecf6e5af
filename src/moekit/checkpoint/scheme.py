"""What config.json says about quantisation, and banks that lie in moekit's own formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.bank import Activation
from moekit.checkpoint.layers import MoELayer
from moekit.checkpoint.reader import Reader
from moekit.errors import CheckpointError, UnsupportedModelError
from moekit.formats import allocate, with_tensors

REWRITE = ".experts.rewrite."
"""In the names of tensors that belong to a rewrite of the routing."""

METHODS = ("fp8", "mxfp4", "compressed-tensors", "moekit")
"""Quantisation methods whose layouts are read."""


@dataclass(frozen=True)
class Scheme:
    """What config.json says about quantisation; ``dtype`` is what quantised weights decode to."""

    config: Mapping[str, Any]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        method = self.config.get("quant_method", METHODS[0])
        if method not in METHODS:
            raise UnsupportedModelError(f"this checkpoint is quantised by {method}; moekit reads {', '.join(METHODS)}")

    @property
    def block(self) -> tuple[int, int]:
        rows, columns = self.config.get("weight_block_size") or (128, 128)
        return int(rows), int(columns)

    @property
    def own(self) -> bool:
        """Whether any layer is in moekit's own format."""
        return self.config.get("quant_method") == "moekit"

    @property
    def counts(self) -> dict[str, int]:
        """How many experts each layer in moekit's format stores."""
        return {name: int(layer["experts"]) for name, layer in (self.config["layers"] if self.own else {}).items()}

    def described(self, layer: str) -> dict[str, Any] | None:
        """What describes the bank of a layer in moekit's format; None for a layer in the family's."""
        from moekit.checkpoint.quantizer import expand_layer

        entry = self.config["layers"].get(layer) if self.own else None
        return None if entry is None else expand_layer(entry)[0]

    def rewrite(self, layer: str) -> dict[str, Any] | None:
        """What describes the rewrite of a layer's routing, where there is one."""
        return self.config["layers"].get(layer, {}).get("rewrite") if self.own else None

    def shares(self, layer: str) -> bool:
        """Whether router rows of a layer in moekit's format share experts, or some are masked."""
        from moekit.checkpoint.quantizer import expand_layer

        entry = self.config["layers"].get(layer) if self.own else None
        return entry is not None and expand_layer(entry)[1] != list(range(entry["experts"]))


def stored_bank(
    reader: Reader,
    scheme: Scheme,
    layer: MoELayer,
    activation: Activation,
    experts: Sequence[int] | None = None,
    device: str = "cpu",
) -> Any:
    """The bank of a layer in moekit's format, as it is stored. Tensors of experts that are not named stay on meta.

    Raises:
        CheckpointError: config.json and the tensors contradict each other, or the layer is not in moekit's format.
    """
    describe = scheme.described(layer.name)
    if describe is None:
        raise CheckpointError(f"quantization_config does not describe {layer.name}, whose experts are packed")
    bank = allocate(describe, layer.hidden_size, layer.intermediate_size, activation, device="meta")
    found = {
        name.rpartition(".experts.")[2]: name
        for tensor in layer.expert_tensors
        for name in tensor.stored.tensors.values()
    }
    tensors: dict[str, Tensor] = {}
    for name, empty in bank.tensors().items():
        if name not in found:
            raise CheckpointError(f"{layer.name}: {name} is not on disk, though config.json describes it")
        info = reader.info(found[name])
        if (info.dtype, info.shape) != (empty.dtype, tuple(empty.shape)):
            raise CheckpointError(
                f"{found[name]} is {info.dtype} {list(info.shape)}, but config.json describes {empty.dtype} "
                f"{list(empty.shape)}"
            )
        number = name.partition(".")[0]
        wanted = experts is None or not number.isdigit() or int(number) in experts
        tensors[name] = reader.read(found[name]) if wanted and device != "meta" else empty
    return with_tensors(bank, tensors)
