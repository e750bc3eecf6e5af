"""The process that owns all experts: one nameless file per device, from which devices map what they serve."""

from __future__ import annotations

import os
from typing import Any

import torch

from moekit.bank import SILU_MUL
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import UnsupportedModelError
from moekit.formats import DenseBank
from moekit.run._virtual import Frames
from moekit.stream import LoadedModel

Place = tuple[int, int]
"""(device, first frame)"""


class Owner:
    """Answers the messages ``load``, ``move``, ``table``, ``settle``, ``clear`` and ``held``, one method each.

    Experts begin at whole pages, in one run of frames, so that any of them can be mapped next to any other. ``peak`` is
    the most memory ever held, over all devices and by device.
    """

    def __init__(self) -> None:
        self.frames: dict[int, Frames] = {}
        self.shapes: list[list[tuple[str, list[int], str]]] = []
        self.now: list[list[Place]] = []
        self.next: list[list[Place]] = []
        self.peak: dict[str, int] = {"all": 0}

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        """Read all experts from disk, each to its device of ``device`` [L, E]."""
        checkpoint = Checkpoint.open(message["checkpoint"])
        model = LoadedModel.load(checkpoint, dtype=getattr(torch, message["dtype"])).model
        self.shapes, self.now = [], []
        for block, devices in zip(blocks(model), message["device"], strict=True):
            parts = stacked(block.bank(), type(block.experts).__name__)
            self.shapes.append([(name, list(t.shape[1:]), str(t.dtype)[6:]) for name, t in parts.items()])
            places = []
            for expert, device in enumerate(devices):
                places.append(self._take(device, len(self.now)))
                for tensor, start in zip(parts.values(), self.starts(len(self.now)), strict=False):
                    data = tensor[expert].contiguous().flatten().view(torch.uint8).numpy()
                    os.pwrite(self.frames[device].fd, data, places[-1][1] * self._page + start)
            self.now.append(places)
            self._note()
        return {"shapes": self.shapes, "bytes": sum(self.size(layer) * len(p) for layer, p in enumerate(self.now))}

    def move(self, message: dict[str, Any]) -> dict[str, Any]:
        """Copy what is to lie on another device of ``device`` [L, E] there (``all``: everything anew); all is kept."""
        moved, count = 0, 0
        self._give_all(self.next, but=self.now)  # of a change that was not carried through
        self.next = []
        try:
            for layer, devices in enumerate(message["device"]):
                self.next.append([])
                for expert, device in enumerate(devices):
                    old = self.now[layer][expert]
                    if device == old[0] and not message["all"]:
                        self.next[layer].append(old)
                        continue
                    new, size = self._take(device, layer), self.size(layer)
                    self.next[layer].append(new)
                    data = os.pread(self.frames[old[0]].fd, size, old[1] * self._page)
                    moved += os.pwrite(self.frames[device].fd, data, new[1] * self._page)
                    count += 1
                self._note()
        except Exception:
            self._give_all(self.next, but=self.now)
            self.next = []
            raise
        return {"bytes": moved, "experts": count}

    def table(self, message: dict[str, Any]) -> dict[str, Any]:
        """First frame of every expert, or -1 where it is on another device than ``of``; its file comes along."""
        device = message["of"]
        frames = [[first if on == device else -1 for on, first in layer] for layer in self.next or self.now]
        return {"frames": frames, "page": self._page, "inode": os.fstat(self.frames[device].fd).st_ino}

    def settle(self, message: dict[str, Any]) -> dict[str, Any]:
        """Nobody maps the old places any more: give back what is not in use."""
        self._give_all(self.now, but=self.next)
        self.now, self.next = self.next, []
        return {}

    def clear(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give everything back."""
        self._give_all(self.now, but=[])
        self.now = []
        return {}

    def held(self, message: dict[str, Any]) -> dict[str, Any]:
        """Bytes held now and at most: over all devices, and by device. ``reset`` begins the peak anew."""
        if message.get("reset"):
            self.peak = {"all": 0}
            self._note()
        return {"now": self._now(), "peak": self.peak}

    def starts(self, layer: int) -> list[int]:
        """Where each part of an expert begins, and the end; multiples of a page."""
        return starts(self.shapes[layer], self._page)

    def size(self, layer: int) -> int:
        return self.starts(layer)[-1]

    @property
    def _page(self) -> int:
        return next(iter(self.frames.values())).page

    def _take(self, device: int, layer: int) -> Place:
        frames = self.frames.setdefault(device, Frames())
        return device, frames.take(self.size(layer) // frames.page)

    def _give_all(self, places: list[list[Place]], but: list[list[Place]]) -> None:
        kept = {place for layer in but for place in layer}
        for layer, row in enumerate(places):
            for device, first in row:
                if (device, first) not in kept:
                    self.frames[device].give(first, self.size(layer) // self._page)

    def _now(self) -> dict[str, int]:
        by = {str(device): frames.physical_bytes for device, frames in self.frames.items()}
        return {**by, "all": sum(by.values())}

    def _note(self) -> None:
        for name, value in self._now().items():
            self.peak[name] = max(self.peak.get(name, 0), value)


def starts(shapes: list[Any], page: int) -> list[int]:
    """Where each part (name, shape, dtype) of one expert begins, and the end; multiples of a page."""
    found = [0]
    for _, shape, dtype in shapes:
        size = getattr(torch, dtype).itemsize
        for length in shape:
            size *= length
        found.append(found[-1] + -(-size // page) * page)
    return found


def stacked(bank: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer's experts. Raises :class:`UnsupportedModelError` where devices could not run them."""
    if not isinstance(bank, DenseBank) or bank.activation is not SILU_MUL:
        raise UnsupportedModelError(f"{name}: only dense experts with a gated SiLU can be served by several processes")
    parts = {n: getattr(bank, n) for n in ("gate_up", "down", "gate_up_bias", "down_bias")}
    return {n: tensor for n, tensor in parts.items() if tensor is not None}
