"""What training with Adam keeps of every expert - weights and both moments - in one file, a few of them in memory.

Parameters after n steps are those of ``torch.optim.AdamW`` on the stacked tensors: an expert that no token used is not
read, and the steps it missed (gradient zero, but moments fade and weights go on) are made up for when it is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moekit.errors import BudgetError, CheckpointError, OptionError, OutputError
from moekit.run.policy import CachePolicy, Key, policy

PARTS = 3
"""Of a record: weights, mean of gradients, mean of their squares."""


@dataclass(frozen=True, kw_only=True)
class Adam:
    """As of ``torch.optim.AdamW``."""

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass
class StateCounters:
    """``requests``: times an expert's state was asked for; ``hits`` were in memory. Bytes to and from the file."""

    requests: int = 0
    hits: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


@dataclass(eq=False)
class _State:
    """One expert in memory: ``parts`` [3, n], ``step`` how many steps it has made, whether the file is behind."""

    parts: Tensor
    step: int
    dirty: bool = False


class ExpertStates:
    """At most ``most`` experts' states in memory, the others in ``folder``.

    ``shapes`` by key are those of an expert's tensors. A step is: :meth:`weights` of those that are used,
    :meth:`update` once for each that has a gradient, :meth:`advance`. A folder that :meth:`flush` left is taken up
    again; one that was written to since is not.

    Raises:
        OptionError: fewer than one expert. CheckpointError: the folder holds other experts, or is damaged.
        OutputError: the file cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        shapes: Mapping[Key, Sequence[torch.Size]],
        most: int,
        adam: Adam | None = None,
        evict: str | CachePolicy = "decayed-lfu",
    ) -> None:
        if most < 1:
            raise BudgetError(f"room for {most} experts' states: give room for at least one")
        self.shapes, self.most, self.adam = dict(shapes), most, adam or Adam()
        self.counters, self.now, self.rates = StateCounters(), 0, list[float]()
        self._policy = evict if isinstance(evict, CachePolicy) else policy(evict)
        self._steps = dict.fromkeys(self.shapes, 0)
        self._there: dict[Key, _State] = {}
        sizes = {key: sum(shape.numel() for shape in own) for key, own in self.shapes.items()}
        self._sizes, self._starts, at = sizes, dict[Key, int](), 0
        for key, size in sizes.items():
            self._starts[key] = at
            at += 4 * PARTS * size
        self.folder = Path(folder)
        self._manifest, self._flushed = self.folder / "states.json", False
        if self._manifest.exists():
            self._take_up()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / "states.bin", os.O_RDWR | os.O_CREAT)
            os.ftruncate(self._file, at)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror}") from None

    @property
    def nbytes(self) -> int:
        """Of all states: three numbers of 4 bytes for each parameter."""
        return 4 * PARTS * sum(self._sizes.values())

    def put(self, key: Key, weights: Sequence[Tensor]) -> None:
        """An expert's first weights; its moments are zero."""
        parts = torch.zeros(PARTS, self._sizes[key])
        parts[0] = torch.cat([weight.detach().reshape(-1) for weight in weights])
        self._write(key, parts)

    def routed(self, layer: int, experts: Sequence[int]) -> None:
        """A batch is about to use ``experts`` of a layer (for the cache)."""
        self._policy.routed(layer, experts, None)

    def weights(self, key: Key) -> list[Tensor]:
        """An expert's tensors as they are after all steps so far; views that hold until another expert is asked for.

        Raises :class:`OptionError` for an expert that was already updated in this step.
        """
        state = self._fetch(key)
        if state.step > self.now:
            raise OptionError(f"expert {key[1]} of layer {key[0]} was already updated in this step: advance first")
        while state.step < self.now:
            self._step(state, torch.zeros_like(state.parts[0]), self.rates[state.step])
        return self._views(key, state.parts[0])

    def update(self, key: Key, grads: Sequence[Tensor]) -> None:
        """Make this step for one expert. Each may be updated once in a step."""
        self.weights(key)
        flat = torch.cat([grad.reshape(-1).float() for grad in grads])
        self._step(self._there[key], flat, self.adam.rate)

    def advance(self, rate: float | None = None) -> None:
        """The step is over; the next one has another ``rate`` if one is given."""
        self.rates.append(self.adam.rate)
        self.now += 1
        if rate is not None:
            self.adam = Adam(**{**vars(self.adam), "rate": rate})

    def flush(self) -> None:
        """Bring the folder up to date, so that training can be taken up from it."""
        for key, state in self._there.items():
            self._save(key, state)
        steps = [[*key, step] for key, step in self._steps.items()]
        os.fsync(self._file)
        self._say({"open": False, "now": self.now, "rates": self.rates, "adam": vars(self.adam), "steps": steps})
        self._flushed = True

    def close(self) -> None:
        """:meth:`flush`, and let all go."""
        self.flush()
        self._there.clear()
        os.close(self._file)

    # -- inside

    def _take_up(self) -> None:
        try:
            said = json.loads(self._manifest.read_text("utf-8"))
            if said["open"]:
                raise CheckpointError(
                    f"{self.folder} was left between two flushes, so its experts are of different steps: start again "
                    "in an empty folder"
                )
            steps = {(layer, expert): step for layer, expert, step in said["steps"]}
            now, rates, adam = said["now"], said["rates"], said["adam"] | {"betas": tuple(said["adam"]["betas"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{self._manifest} is damaged: start again in an empty folder") from None
        whole = 4 * PARTS * sum(self._sizes.values())
        if steps.keys() != self._steps.keys() or (self.folder / "states.bin").stat().st_size != whole:
            raise CheckpointError(f"{self.folder} holds the states of other experts: give an empty folder")
        self._steps, self.now, self.rates, self.adam = steps, now, rates, Adam(**adam)
        self._flushed = True

    def _say(self, what: Mapping[str, Any]) -> None:
        partial = self._manifest.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(what), "utf-8")
            partial.replace(self._manifest)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror}") from None

    def _fetch(self, key: Key) -> _State:
        self.counters.requests += 1
        if key in self._there:
            self.counters.hits += 1
            return self._there[key]
        if len(self._there) >= self.most:
            gone = self._policy.victim(self._there, (), key)
            gone = next(iter(self._there)) if gone is None else gone
            self._save(gone, self._there.pop(gone))
            self._policy.evicted(gone)
        self._there[key] = _State(self._read(key), self._steps[key])
        self._policy.admitted(key)
        return self._there[key]

    def _step(self, state: _State, grad: Tensor, rate: float) -> None:
        param, mean, square = state.parts.unbind(0)
        adam, state.dirty = self.adam, True
        adamw(
            [param],
            [grad],
            [mean],
            [square],
            [],
            [torch.tensor(float(state.step))],
            foreach=False,
            amsgrad=False,
            beta1=adam.betas[0],
            beta2=adam.betas[1],
            lr=rate,
            weight_decay=adam.weight_decay,
            eps=adam.eps,
            maximize=False,
        )
        state.step += 1

    def _views(self, key: Key, flat: Tensor) -> list[Tensor]:
        parts = flat.split([shape.numel() for shape in self.shapes[key]])
        return [part.view(shape) for part, shape in zip(parts, self.shapes[key], strict=True)]

    def _save(self, key: Key, state: _State) -> None:
        if state.dirty:
            self._write(key, state.parts)
            self._steps[key], state.dirty = state.step, False

    def _write(self, key: Key, parts: Tensor) -> None:
        if self._flushed:
            self._say({"open": True})
            self._flushed = False
        left, at = memoryview(parts.numpy()).cast("B"), self._starts[key]
        self.counters.written_bytes += len(left)
        try:
            while left:
                done = os.pwrite(self._file, left, at)
                left, at = left[done:], at + done
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror}") from None

    def _read(self, key: Key) -> Tensor:
        parts = torch.empty(PARTS, self._sizes[key])
        view = memoryview(parts.numpy()).cast("B")
        self.counters.read_bytes += len(view)
        if os.preadv(self._file, [view], self._starts[key]) != len(view):
            raise CheckpointError(f"{self.folder} ends too soon: start again in an empty folder")
        return parts
