"""A model without weights that is ready to receive them, and how a batch is put through it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.checkpoint import Checkpoint


class CheckpointSource:
    """The weights of a checkpoint as the conversion wants them: plain, decoded where they are stored quantised.

    Except moekit's own packed experts, whose module takes the integers as they are.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def names(self) -> Iterable[str]:
        for name, stored in self._checkpoint.stored.items():
            if stored.carrier == "qweight":
                yield from stored.tensors.values()
            else:
                yield name

    def nbytes(self, name: str) -> int:
        """Bytes in memory once read; decoding passes through float32."""
        stored, tensors = self._checkpoint.stored.get(name), self._checkpoint.tensors
        if stored is None:
            return tensors[name].nbytes
        size = sum(tensors[part].nbytes for part in stored.tensors.values())
        return size if stored.carrier == "weight" and len(stored.tensors) == 1 else 10 * size

    def read(self, name: str) -> Tensor:
        stored = self._checkpoint.stored.get(name)
        if stored is None or stored.tensors == {"weight": name}:
            return self._checkpoint.read(name)
        return self._checkpoint.read_plain(name, self._dtype)


def live_skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The checkpoint's model with parameters on the meta device and computed buffers (rotary tables) in place."""
    model = checkpoint.skeleton(dtype)
    # Buffers that no file holds come from the family's own initialisation. Once: a second call would find everything
    # marked as initialised and leave fresh memory in them.
    model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
    model.initialize_weights()
    return model.eval()


def call(model: PreTrainedModel, batch: dict[str, Any], device: torch.device, logits: bool) -> Callable[[], Tensor]:
    """``model(**batch)`` as a function of nothing that returns the logits."""
    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" not in batch else {}
    if not logits and "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1

    def run() -> Tensor:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        output = model(**moved, **extra)
        return output.logits if getattr(output, "logits", None) is not None else output[0]

    return run
