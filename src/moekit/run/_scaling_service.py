"""A model whose experts are served by one process per device, while devices come and go.

The dense parts run here, in the threads that ask; experts lie with their owner (:mod:`moekit.run._scaling_owner`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.blocks import MoEBlock, blocks
from moekit.checkpoint import Checkpoint
from moekit.contract import Routing, weighted_sum
from moekit.errors import OptionError, UnsupportedModelError
from moekit.kernels import is_decorated
from moekit.run._scaling_crew import Crew
from moekit.run._scaling_wire import SECONDS, ScalingError
from moekit.stream import LoadedModel

NAME = "moekit-elastic"
Plan = Callable[[np.ndarray, Sequence[int]], np.ndarray]
How = Literal["move", "copy", "cold"]


@dataclass(eq=False)
class Epoch:
    """One placement that requests run under: ``device`` [L, E] of each expert, and its ``slot`` [L, E] there."""

    number: int
    device: Tensor
    slot: Tensor = field(init=False)
    running: int = 0

    def __post_init__(self) -> None:
        self.slot = torch.zeros_like(self.device)
        for device in self.devices:
            here = self.device == device
            self.slot[here] = (here.cumsum(1) - 1)[here]

    @property
    def devices(self) -> list[int]:
        return sorted(set(self.device.flatten().tolist()))


@dataclass(frozen=True)
class Scaled:
    """What a change of devices took. Bytes are of experts; ``frames`` is where each lay before and lies now."""

    moved_experts: int
    moved_bytes: int
    closed_seconds: float
    seconds: float
    peak: dict[str, int]
    held: dict[str, int]
    frames: tuple[dict[tuple[int, int], tuple[int, int]], dict[tuple[int, int], tuple[int, int]]]


class ElasticService:
    """Answers from any number of threads; :meth:`scale` changes the devices meanwhile.

    ``plan`` gives the new device of every expert of a layer from the present ones. Closing is up to whoever opened it.

    Raises:
        CheckpointError: no usable checkpoint.
        OptionError: devices that the plan cannot place experts on.
        ScalingError: a process could not be started.
        UnsupportedModelError: experts that other processes cannot run.
    """

    def __init__(self, ref: str | os.PathLike[str], device_E: Callable[[int], np.ndarray], plan: Plan) -> None:
        checkpoint = Checkpoint.open(ref)
        self.model = LoadedModel.load(checkpoint, dtype=torch.float32, absent=_absent).model
        self.blocks, self._plan = blocks(self.model), plan
        first = torch.tensor(np.stack([device_E(block.num_experts) for block in self.blocks]))
        self._lock, self._scaling = threading.Condition(), threading.Lock()
        self._local, self._open, self._ref = threading.local(), True, str(ref)
        self.crew = Crew()
        try:
            self._load(first)
            self.epoch = Epoch(0, first)
            self._attach(self.epoch)
        except BaseException:
            self.crew.close()
            raise
        self._install()

    @torch.no_grad()
    def ask(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]. Raises :class:`ScalingError` where a process is lost."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._open, SECONDS):
                raise ScalingError(f"no answer within {SECONDS:.0f} seconds: the service is closed for a restart")
            epoch = self._local.epoch = self.epoch
            epoch.running += 1
        try:
            return self.model(ids).logits
        finally:
            self._local.epoch = None
            with self._lock:
                epoch.running -= 1
                self._lock.notify_all()

    def scale(self, devices: Sequence[int], how: How = "move") -> Scaled:
        """Serve from ``devices`` from now on; returns when the old ones have nothing left to do.

        ``move`` copies what must lie elsewhere while requests go on; ``copy`` copies everything, and ``cold`` stops,
        forgets everything and reads it from disk anew: these two are there to compare with.

        Raises:
            OptionError: devices that the plan cannot place experts on. BudgetError: as ScalingError.
            ScalingError: a process failed; where memory for the copies was short, the old devices go on serving.
        """
        with self._scaling:
            started, old = time.perf_counter(), self.epoch
            planned = [self._plan(device_E.numpy(), devices) for device_E in old.device]
            new = Epoch(old.number + 1, torch.tensor(np.stack(planned)))
            self.crew.owner.ask({"do": "held", "reset": True})
            before = self._frames(old)
            closed = self._restart(old, new) if how == "cold" else 0.0
            moved: dict[str, Any] = {"bytes": 0, "experts": 0}
            if how != "cold":
                order = {"do": "move", "device": new.device.tolist(), "all": how == "copy"}
                moved, _, _ = self.crew.owner.ask(order)
                self._attach(new)
                self._switch(new)
                self._retire(old)
                self.crew.owner.ask({"do": "settle"})
            self.crew.dismiss(set(old.devices) - set(new.devices))
            after, (held, _, _) = self._frames(new), self.crew.owner.ask({"do": "held"})
            seconds = time.perf_counter() - started
            return Scaled(moved["experts"], moved["bytes"], closed, seconds, held["peak"], held["now"], (before, after))

    def close(self) -> None:
        """End all processes. The model cannot be asked any more."""
        self.crew.close()

    # -- one layer

    def layer(self, number: int, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, H]: every row computed where its expert lies, then added up here, slot by slot."""
        epoch: Epoch | None = getattr(self._local, "epoch", None)
        if epoch is None:
            raise OptionError("the experts of this model lie with other processes: ask the service, not the model")
        flat, slots = index_TK.flatten(), index_TK.shape[1]
        used = (flat >= 0) & (flat < self.blocks[number].num_experts)
        expert = torch.where(used, flat, 0)
        device_S, slot_S = epoch.device[number, expert], epoch.slot[number, expert]
        pairs = {d: torch.nonzero(used & (device_S == d)).flatten() for d in epoch.devices}
        orders: dict[int, tuple[dict[str, Any], list[Any]]] = {}
        for device, at in pairs.items():
            if len(at):
                head = {"do": "run", "epoch": epoch.number, "layer": number, "rows": len(at)}
                rows = x_TH[at // slots].contiguous().view(torch.uint8)
                orders[device] = ({**head, "dtype": str(x_TH.dtype)[6:]}, [slot_S[at].numpy(), rows.numpy()])
        out = x_TH.new_zeros(len(flat), x_TH.shape[1])
        for device, data in self.crew.compute(orders).items():
            out[pairs[device]] = torch.frombuffer(data, dtype=x_TH.dtype).view(-1, x_TH.shape[1])
        found = self.blocks[number].layout.finish(out.view(*index_TK.shape, -1))
        found = found.where(used.view(index_TK.shape)[..., None], 0)
        return weighted_sum(found, Routing(index_TK, weight_TK * used.view(index_TK.shape)))

    # -- steps of a change

    def _load(self, device_LE: Tensor) -> None:
        order = {"do": "load", "checkpoint": self._ref, "dtype": "float32", "device": device_LE.tolist()}
        reply, _, _ = self.crew.owner.ask(order)
        self._shapes, self.expert_bytes = reply["shapes"], reply["bytes"]

    def _attach(self, epoch: Epoch) -> None:
        for device in epoch.devices:
            table, _, fds = self.crew.owner.ask({"do": "table", "of": device})
            order = {"do": "attach", "epoch": epoch.number, "shapes": self._shapes, **table}
            try:
                self.crew.tell(device, order, fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _switch(self, new: Epoch) -> None:
        with self._lock:
            self.epoch = new

    def _retire(self, old: Epoch) -> None:
        """Wait for the requests that run under an epoch, then unmap it."""
        with self._lock:
            if not self._lock.wait_for(lambda: not old.running, SECONDS):
                raise ScalingError(f"{old.running} requests under the old devices did not end in {SECONDS:.0f} seconds")
        for device in old.devices:
            self.crew.tell(device, {"do": "release", "epoch": old.number})

    def _restart(self, old: Epoch, new: Epoch) -> float:
        """The baseline; returns the seconds for which nothing was answered."""
        with self._lock:
            self._open = False
        started = time.perf_counter()
        try:
            self._retire(old)
            self.crew.owner.ask({"do": "clear"})
            self._load(new.device)
            self._attach(new)
            self._switch(new)
        finally:
            with self._lock:
                self._open = True
                self._lock.notify_all()
        return time.perf_counter() - started

    def _frames(self, epoch: Epoch) -> dict[tuple[int, int], tuple[int, int]]:
        """(layer, expert) -> (inode, first frame): the physical place of every expert."""
        found = {}
        for device in epoch.devices:
            table, _, fds = self.crew.owner.ask({"do": "table", "of": device})
            for fd in fds:
                os.close(fd)
            for layer, row in enumerate(table["frames"]):
                found.update({(layer, e): (table["inode"], first) for e, first in enumerate(row) if first >= 0})
        return found

    def _install(self) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, _elastic_forward)
        for number, block in enumerate(self.blocks):
            module: Any = block.experts
            module.__dict__["_moekit_elastic"] = (self, number)
            module.config._experts_implementation = NAME


def _elastic_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    service, number = self.__dict__["_moekit_elastic"]
    return service.layer(number, hidden_states, top_k_index, top_k_weights)


def _absent(model: PreTrainedModel) -> list[str]:
    """State-dict keys of the experts, which stay on the meta device. Raises where they cannot."""
    names = {module: name for name, module in model.named_modules()}
    return [f"{names[block.experts]}.{part}" for block in blocks(model) for part in _parts(block)]


def _parts(block: MoEBlock) -> list[str]:
    if not is_decorated(block.experts) or not hasattr(block.layout, "oriented"):
        raise UnsupportedModelError(
            f"{type(block.experts).__name__} keeps its experts in a way that other processes cannot map: "
            "serve this model from one process"
        )
    return list(dict(block.experts.named_parameters(recurse=False)))
