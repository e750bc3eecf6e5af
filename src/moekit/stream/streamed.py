"""A model that runs layer by layer from disk: one layer's weights resident at a time, all batches passing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from moekit.checkpoint import Checkpoint
from moekit.errors import UnsupportedModelError
from moekit.kernels import warm_up
from moekit.stream import _footprint as footprint
from moekit.stream import memory
from moekit.stream._anatomy import anatomy
from moekit.stream._lockstep import Batch, walk
from moekit.stream._skeleton import CheckpointSource, call, forget, keeps_last, live_skeleton
from moekit.stream._weights import Weights, keys_under

USUAL_BATCH = (4, 512)
"""Sequences and tokens of the batch that is reckoned with before any is known."""
Beside = tuple[int, int]
"""Bytes held beside a runner while it runs and afterwards, and the most that what follows takes on top of these."""
MAX_THREADS = 2048
"""Threads of one pass in all: each waiting batch has one, and as many again as torch computes with."""


class StreamedModel:
    """``model`` is a skeleton whose layers hold weights only while they run; hooks, edits and observers attach to it as
    to any live model. ``batch`` is the index of the batch that runs at the moment, for observers. ``edit``, if set, is
    called with the path of each layer once its weights are there and before anything runs through it; what it writes
    into them goes when they go. ``edit_bytes``: the memory it takes meanwhile, which counts towards the cap.

    Args:
        checkpoint: what to run.
        device: where layers are brought and batches computed.
        dtype: of the weights in memory; the checkpoint's own if None.
        max_ram: cap on the process's peak resident set (bytes, "3GB" or None). The next layer is read while the
            present one computes wherever the cap has room for both.
        beside: bytes that the caller will hold beside the runner or need after it, told by the model; a cap that is
            refused is named large enough for them.

    Raises:
        BudgetError: at once, if the largest layer does not fit under the cap; names the smallest that works.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_ram: int | float | str | memory.Cap | None = None,
        beside: Callable[[StreamedModel], Beside] | None = None,
    ) -> None:
        self.checkpoint, self.device, self.cap = checkpoint, torch.device(device), memory.cap(max_ram)
        self.model = live_skeleton(checkpoint, dtype, self.device)
        self.batch = -1
        self.edit: Callable[[str], None] | None = None
        self.edit_bytes = 0
        self.weights = Weights(
            self.model, CheckpointSource(checkpoint, self.model.dtype), self.device, str(checkpoint.path)
        )
        parts = anatomy(self.model)
        self.layers: list[nn.Module] = list(parts.layers.values())
        self._paths = list(parts.layers)
        self._layer_keys = [keys_under(self.weights.meta, name) for name in parts.layers]
        self._around = self._own_keys(parts.around)
        self._outside = {module: self._own_keys({name: module}) for name, module in parts.outside.items()}
        # The head is as large as a layer: the batches wait before it too, so that the last layer can go first.
        self._head = next((m for m in self._outside if m is self.model.get_output_embeddings()), None)
        self._stops, self._stop_keys = list(self.layers), list(self._layer_keys)
        if self._head is not None:
            self._stops.append(self._head)
            self._stop_keys.append(self._outside.pop(self._head))
        self._itemsize = self.model.dtype.itemsize
        usual = {"input_ids": torch.empty(USUAL_BATCH, dtype=torch.int64, device="meta")}
        if self.cap.limit is not None:
            warm_up(torch.bfloat16, torch.float32)
            held, later = beside(self) if beside is not None else (0, 0)
            named = held + max(later, self.needed_bytes(usual, logits=False))
            self.cap.require(self.weight_bytes(), "the largest layer", named=named)

    def _own_keys(self, modules: dict[str, nn.Module]) -> list[str]:
        """State-dict keys that belong to the modules themselves, not to what is inside them."""
        own = [f"{name}.{key}".lstrip(".") for name, m in modules.items() for key in [*m._parameters, *m._buffers]]
        return [key for key in own if key in self.weights.meta]

    def weight_bytes(self, running: int = 0, head: int = 0, ahead: bool = False) -> int:
        """The most bytes a pass holds besides the batches that wait, when the one that runs takes ``running`` in a
        layer and ``head`` in the head; with a second layer where layers are read ``ahead``.

        A layer is loaded, then edited, and only then anything runs through it: one at a time, unless read ahead.
        """
        resident, loading = self.weights.resident_bytes, self.weights.loading_bytes
        if self._head is None:
            running = max(running, head)
        works = [max(running, self.edit_bytes)] * len(self.layers) + [head]
        beside = max(map(resident, self._outside.values()), default=0) + resident(self._around)
        steps = [(resident(keys), loading(keys), work) for keys, work in zip(self._stop_keys, works, strict=False)]
        if ahead:
            return beside + sum(max(step) for step in zip(*steps, strict=True))
        alone = max(map(loading, self._outside.values()), default=0)
        return max(
            beside + max((weights + work for weights, _, work in steps), default=0),
            resident(self._around) + max([alone, *(coming for _, coming, _ in steps)]),
        )

    def needed_bytes(self, batch: Batch, logits: bool = True) -> int:
        """The most bytes a pass of this one batch holds, beyond what is resident before it."""
        return self._fixed_bytes([batch], logits) + self._parked_bytes([batch])

    def _fixed_bytes(self, batches: Sequence[Batch], logits: bool, ahead: bool = False) -> int:
        """What does not grow with the number of batches that wait."""
        config, size, last_only = self.model.config, self._itemsize, not logits and keeps_last(self.model)
        running = max((footprint.running_bytes(config, batch, size) for batch in batches), default=0)
        head = max((footprint.head_bytes(config, batch, size, last_only) for batch in batches), default=0)
        return self.weight_bytes(running, head, ahead)

    def _parked_bytes(self, batches: Sequence[Batch]) -> int:
        """Of the batch that takes most while it waits."""
        sizes = (footprint.parked_bytes(self.model.config, batch, self._itemsize) for batch in batches)
        return max(sizes, default=0)

    def _groups(self, batches: Sequence[Batch], logits: bool) -> list[Sequence[Batch]]:
        """The batches that wait together, as many as fit between the layers. More groups read the layers again."""
        fit, room = max(1, MAX_THREADS // torch.get_num_threads()), self.cap.room()
        if room is not None and batches:
            parked, fixed = self._parked_bytes(batches), self._fixed_bytes(batches, logits)
            self.cap.require(fixed + parked, "the largest layer with one batch")
            fit = min(fit, max(1, (room - fixed) // parked))
        return [batches[start : start + fit] for start in range(0, len(batches), fit)]

    def forward(
        self,
        batches: Sequence[Batch],
        *,
        logits: bool = True,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the logits of each batch (keyword arguments of the model), [B, S, V], in order.

        Bit-identical to the loaded model's in float32. With ``logits`` False only the last position's are computed
        where the family can (for callers that watch the layers). ``on_layer(done, total)`` reports progress.
        """
        groups, start = self._groups(batches, logits), 0
        total = len(groups) * len(self.layers)
        for number, group in enumerate(groups):

            def tell(at: int, of: int, before: int = number * len(self.layers)) -> None:
                if on_layer is not None and at <= len(self.layers):
                    on_layer(before + at, total)

            yield from self._pass(group, start, logits, tell)
            start += len(group)

    def _pass(
        self, group: Sequence[Batch], start: int, logits: bool, tell: Callable[[int, int], None]
    ) -> Iterator[Tensor]:
        def on_run(index: int) -> None:
            self.batch = start + index

        residency = _Residency(self, self._reads_ahead(group, logits))
        calls = [call(self.model, batch, self.device, logits) for batch in group]
        try:
            residency.open()
            yield from walk(self.model, self._stops, residency, calls, on_run=on_run, on_layer=tell)
        finally:
            residency.close()
            self.batch = -1

    def _reads_ahead(self, group: Sequence[Batch], logits: bool) -> bool:
        room = self.cap.room()
        if room is None:
            return True
        waiting = sum(self._parked_bytes([batch]) for batch in group)
        return room > waiting + self._fixed_bytes(group, logits, ahead=True)


class _Residency:
    """Which weights are on the device during one pass (the lockstep's ``Residency``)."""

    def __init__(self, owner: StreamedModel, ahead: bool) -> None:
        self.owner, self.weights = owner, owner.weights
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="next-layer") if ahead else None
        self.coming: dict[int, Future[None]] = {}
        self.here: dict[nn.Module, list[str]] = {}
        self.hooks: list[Any] = []

    def open(self) -> None:
        self.weights.load(self.owner._around)
        for module in self.owner._outside:
            self.hooks.append(module.register_forward_pre_hook(self._bring, prepend=True))
        # Some families ask where the token embedding is before they call it.
        if (embedding := self.owner.model.get_input_embeddings()) in self.owner._outside:
            self._bring(embedding, ())

    def _bring(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module outside the layers is about to run: its weights come now and stay until the next layer begins."""
        if any(isinstance(value, Tensor) and value.is_meta for value in args):
            # Left alone, some operations would read such a tensor as whatever lies in memory.
            raise UnsupportedModelError(
                f"{type(self.owner.model).__name__} cannot be run layer by layer: it moves inputs to the weights of "
                f"{type(module).__name__} are before it calls it; run it in memory, without a cap"
            )
        if module not in self.here:
            self.here[module] = self.owner._outside[module]
            self.weights.load(self.here[module])

    def enter(self, stop: int) -> None:
        for module in list(self.here):
            self.weights.free(self.here.pop(module))
        if (future := self.coming.pop(stop, None)) is not None:
            future.result()
        else:
            self.weights.load(self.owner._stop_keys[stop])
        if self.owner.edit is not None and stop < len(self.owner.layers):
            self.owner.edit(self.owner._paths[stop])
        if self.reader is not None and stop + 1 < len(self.owner._stops):
            following = self.owner._stop_keys[stop + 1]
            self.coming[stop + 1] = self.reader.submit(self.weights.load, following)

    def leave(self, stop: int) -> None:
        self.weights.free(self.owner._stop_keys[stop])
        forget(self.owner._stops[stop])
        if self.owner.cap.limit is not None:
            memory.trim()

    def close(self) -> None:
        if self.reader is not None:
            self.reader.shutdown(wait=True)
        for hook in self.hooks:
            hook.remove()
        for keys in [self.owner._around, *self.here.values(), *self.owner._stop_keys]:
            self.weights.free(keys)
        self.here.clear()
        memory.trim()


def smallest_cap(checkpoint: Checkpoint, batch: Batch | None = None, dtype: torch.dtype | None = None) -> int:
    """Bytes of resident set with which ``checkpoint`` can be run layer by layer, one ``batch`` at a time.

    Counts what this process holds now, the largest layer while it is loaded, and one batch between the layers.
    """
    model = StreamedModel(checkpoint, dtype=dtype)
    return memory.smallest_for(model.weight_bytes() if batch is None else model.needed_bytes(batch, logits=True))
