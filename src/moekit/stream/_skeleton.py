"""A model without weights that is ready to receive them, and how a batch is put through it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.checkpoint import Checkpoint
from moekit.checkpoint.quantizer import METHOD
from moekit.kernels import BankExperts


class CheckpointSource:
    """The weights of a checkpoint as the conversion wants them: decoded where they are stored quantised.

    moekit's own packed experts are the exception: their modules compute on the packed tensors, which stay as they are.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._packed = checkpoint.scheme.config.get("quant_method") == METHOD

    def names(self) -> Iterable[str]:
        return self._checkpoint.tensors if self._packed else self._checkpoint.stored

    def nbytes(self, name: str) -> int:
        """Bytes in memory while it is read; decoded tensors are larger than what is stored."""
        if self._plain(name):
            return self._checkpoint.tensors[name].nbytes
        stored = self._checkpoint.stored[name]
        kept = self._dtype.itemsize
        # Elements per stored byte, and bytes per element. Blocks stack all experts, so that the indices and floats
        # they are decoded through are as large as the layer; the others are decoded expert by expert.
        elements, width = {"packed": (2, kept), "blocks": (2, kept + 16)}.get(stored.carrier, (1, kept))
        return self._checkpoint.tensors[stored.tensors[stored.carrier]].nbytes * elements * width

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(name) if self._plain(name) else self._checkpoint.read_plain(name, self._dtype)

    def _plain(self, name: str) -> bool:
        return self._packed or self._checkpoint.stored[name].tensors == {"weight": name}


def live_skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The checkpoint's model with parameters on the meta device and computed buffers (rotary tables) in place."""
    model = checkpoint.skeleton(dtype)
    # Buffers that no file holds come from the family's own initialisation. Once: a second call would find everything
    # marked as initialised and leave fresh memory in them.
    model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
    model.initialize_weights()
    return model.eval()


def forget(module: nn.Module) -> None:
    """Let packed experts drop what they prepared from weights that are gone."""
    for inner in module.modules():
        if isinstance(inner, BankExperts):
            inner.to("meta")


def keeps_last(model: PreTrainedModel) -> bool:
    """Whether the model can be asked for the logits of the last position alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def call(model: PreTrainedModel, batch: dict[str, Any], device: torch.device, logits: bool) -> Callable[[], Tensor]:
    """``model(**batch)`` as a function of nothing that returns the logits."""
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" not in batch else {}
    if not logits and keeps_last(model):
        extra["logits_to_keep"] = 1

    def run() -> Tensor:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        output = model(**moved, **extra)
        return output.logits if getattr(output, "logits", None) is not None else output[0]

    return run
