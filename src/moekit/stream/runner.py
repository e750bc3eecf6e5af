"""One way to run a checkpoint, whether it fits into memory or not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.checkpoint import Checkpoint
from moekit.errors import OptionError
from moekit.stream import memory
from moekit.stream._lockstep import Batch
from moekit.stream._skeleton import CheckpointSource, call, live_skeleton
from moekit.stream._weights import Weights
from moekit.stream.streamed import Beside, StreamedModel

_HEADROOM = 1.15
"""Weights in memory leave at least this share for activations."""


class Runner(Protocol):
    """``model`` to attach observers to, ``forward`` to run batches, ``batch``: the index of the one that runs."""

    model: PreTrainedModel
    device: torch.device
    batch: int

    def forward(
        self, batches: Sequence[Batch], *, logits: bool = True, on_layer: Callable[[int, int], None] | None = None
    ) -> Iterator[Tensor]: ...


class LoadedModel:
    """A model that is wholly in memory, run one batch after another."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> None:
        self.model, self.checkpoint, self.batch = model.eval(), checkpoint, -1
        self.device = next(model.parameters()).device

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        absent: Callable[[PreTrainedModel], Collection[str]] | None = None,
        beside: Callable[[PreTrainedModel], int] | None = None,
        max_ram: int | float | str | memory.Cap | None = None,
    ) -> LoadedModel:
        """Every tensor read once into memory of its own; dense, whatever the layout on disk.

        ``absent`` names, for the empty model, the state-dict keys that stay on the meta device; ``beside`` is how many
        bytes will be wanted beside the others under ``max_ram``.

        Raises:
            BudgetError: what is to be loaded does not fit under ``max_ram``; names the smallest that works.
        """
        model = live_skeleton(checkpoint, dtype, torch.device(device))
        weights = Weights(model, CheckpointSource(checkpoint, model.dtype), torch.device(device), str(checkpoint.path))
        left_out = set(absent(model)) if absent else set[str]()
        keys = [key for key in weights.meta if key not in left_out]
        need = max(weights.loading_bytes(keys), weights.resident_bytes(keys) + (beside(model) if beside else 0))
        memory.cap(max_ram).require(need, "what is always in memory" if left_out else "the whole model")
        weights.load(keys)
        memory.trim()
        return cls(model, checkpoint)

    @torch.no_grad()
    def forward(
        self, batches: Sequence[Batch], *, logits: bool = True, on_layer: Callable[[int, int], None] | None = None
    ) -> Iterator[Tensor]:
        """As :meth:`StreamedModel.forward`; ``on_layer`` is told of batches here."""
        try:
            for index, batch in enumerate(batches):
                self.batch = index
                yield call(self.model, batch, self.device, logits)()
                if on_layer is not None:
                    on_layer(index + 1, len(batches))
        finally:
            self.batch = -1


def pick_device(device: str | torch.device) -> torch.device:
    """``auto``: the first CUDA device where there is one, else the CPU."""
    name = str(device)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise OptionError(f"unknown device '{name}': use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError(
            "device cuda was asked for, but this machine or this build of torch has none: use --device cpu"
        )
    return torch.device(name)


def open_model(
    ref: str | os.PathLike[str] | Checkpoint,
    device: str | torch.device = "auto",
    max_ram: int | float | str | memory.Cap | None = None,
    dtype: torch.dtype | None = None,
    beside: Callable[[StreamedModel], Beside] | None = None,
) -> LoadedModel | StreamedModel:
    """In memory if the dense weights fit under the cap (without one: into four fifths of what is free), else streamed.

    ``beside``: see :class:`StreamedModel`.

    Raises:
        CheckpointError: ``ref`` is no usable checkpoint. BudgetError: the cap is too small even for one layer.
        OptionError: an unknown or absent device, a cap that is no size.
    """
    checkpoint = ref if isinstance(ref, Checkpoint) else Checkpoint.open(ref)
    limit, place = memory.cap(max_ram), pick_device(device)
    streamed = StreamedModel(checkpoint, device=place, dtype=dtype, max_ram=limit, beside=beside)
    total = streamed.weights.resident_bytes(streamed.weights.meta) * _HEADROOM
    if total < _available(place, limit):
        del streamed
        return LoadedModel.load(checkpoint, device=place, dtype=dtype)
    return streamed


def _available(device: torch.device, limit: memory.Cap) -> float:
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    free = memory.free_memory() * 0.8
    room = limit.room()
    return free if room is None else min(free, room / 2)
