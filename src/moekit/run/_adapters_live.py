"""A live model that answers for itself and for its adapters, all in one batch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.blocks import MoEBlock, blocks
from moekit.errors import MoekitError, OptionError, UnsupportedModelError
from moekit.formats import DenseBank
from moekit.kernels import is_decorated
from moekit.run._adapters import BASE, AdaptedLayer, Adapter
from moekit.run._virtual import Frames

NAME = "moekit-adapters"


class InUseError(MoekitError):
    """An adapter whose sequences are being computed cannot be evicted."""


class AdaptedModel:
    """The model's experts moved to virtual memory, with ``places`` for adapters of at most ``most`` experts a layer.

    The model runs as before; under :meth:`serving` each sequence of a batch may use an adapter. What observes its
    routers sees the base's numbers. Adapters may be loaded and evicted while other threads serve others. No backward.

    Raises:
        OptionError: no places, or ``most`` below one.
        UnsupportedModelError: experts that do not lie stacked behind transformers' shared contract.
    """

    def __init__(self, model: PreTrainedModel, places: int, most: int, page: int) -> None:
        if places < 1 or most < 1:
            raise OptionError(f"{places} adapters of at most {most} experts a layer: expected 1 or more of both")
        self.blocks = blocks(model)
        banks = [_dense(block) for block in self.blocks]
        self.frames = Frames(page)
        self.layers = [AdaptedLayer(bank, self.frames, places, most) for bank in banks]
        self.places, self.most = places, most
        self._place: dict[str, int] = {}
        self._busy: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._local = threading.local()
        for block, layer in zip(self.blocks, self.layers, strict=True):
            self._install(block, layer)

    @property
    def loaded(self) -> list[str]:
        """The adapters there are."""
        return sorted(self._place)

    def load(self, name: str, adapter: Adapter) -> None:
        """Bring an adapter into memory.

        Raises:
            OptionError: the name is taken, all places are, or the adapter does not fit this model or its places.
            BudgetError: there is no memory; nothing has changed then.
        """
        with self._lock:
            self._check(name, adapter)
            place = min(set(range(self.places)) - set(self._place.values()))
            done: list[AdaptedLayer] = []
            try:
                for layer, experts, bank in zip(self.layers, adapter.experts, adapter.banks, strict=True):
                    layer.load(place, experts, bank)
                    done.append(layer)
            except MoekitError:
                for layer in done:
                    layer.evict(place)
                raise
            self._place[name] = place

    def evict(self, name: str) -> None:
        """Give an adapter's memory back. Raises :class:`InUseError` while it serves, OptionError if unknown."""
        with self._lock:
            self._known(name)
            if self._busy[name]:
                raise InUseError(
                    f"adapter {name!r} is computing {self._busy[name]} sequences: evict it when they are done"
                )
            place = self._place.pop(name)
            for layer in self.layers:
                layer.evict(place)

    @contextmanager
    def serving(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """In this thread, sequence b of every batch uses ``adapters[b]`` (None: the base). Raises OptionError."""
        named = [name for name in adapters if name is not None]
        with self._lock:
            for name in named:
                self._known(name)
            places = [BASE if name is None else self._place[name] for name in adapters]
            self._busy.update(named)
        self._local.places = torch.tensor(places)
        try:
            yield
        finally:
            self._local.places = None
            with self._lock:
                self._busy.subtract(named)

    def forward(
        self, block: MoEBlock, layer: AdaptedLayer, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        if torch.is_grad_enabled() and (x_TH.requires_grad or weight_TK.requires_grad):
            raise OptionError("experts with adapters have no backward: call the model under torch.no_grad()")
        places_B = getattr(self._local, "places", None)
        if places_B is None:
            places_B = torch.tensor([BASE])
        if len(x_TH) % len(places_B):
            raise OptionError(f"{len(x_TH)} tokens came for the {len(places_B)} sequences announced to serving()")
        place_T = places_B.repeat_interleave(len(x_TH) // len(places_B))
        return layer.run(x_TH, index_TK, weight_TK, place_T, block.layout.finish)

    def _install(self, block: MoEBlock, layer: AdaptedLayer) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, _adapted_forward)
        module: Any = block.experts
        own = {n: getattr(layer.bank, n)[: layer.num_experts] for n in _parts(layer.bank)}
        layout: Any = block.layout
        for name, value in layout.oriented(DenseBank(**own, activation=layer.bank.activation)).items():
            getattr(module, name).data = value  # the same memory: the base's experts are there once
        module.__dict__["_moekit_adapted"] = (self, block, layer)
        module.config._experts_implementation = NAME

    def _check(self, name: str, adapter: Adapter) -> None:
        if name in self._place:
            raise OptionError(f"there is an adapter {name!r} already: evict it first")
        if len(self._place) == self.places:
            raise OptionError(f"all {self.places} places hold an adapter: evict one of {', '.join(self.loaded)}")
        if len(adapter.experts) != len(self.layers):
            raise OptionError(
                f"adapter {name!r} is of {len(adapter.experts)} MoE layers, the model has {len(self.layers)}"
            )
        if adapter.largest > self.most:
            raise OptionError(
                f"adapter {name!r} replaces up to {adapter.largest} experts in a layer, a place holds {self.most}"
            )
        for number, (layer, experts, bank) in enumerate(zip(self.layers, adapter.experts, adapter.banks, strict=True)):
            if wrong := [e for e in experts if not 0 <= e < layer.num_experts]:
                raise OptionError(
                    f"adapter {name!r} replaces expert {wrong[0]} of layer {number}, which has {layer.num_experts}"
                )
            if bank is not None and (found := _shapes(bank)) != (expected := _shapes(layer.bank)):
                raise OptionError(f"adapter {name!r} has experts of {found} in layer {number}, the model {expected}")

    def _known(self, name: str) -> None:
        if name not in self._place:
            raise OptionError(f"no adapter {name!r} is loaded: there are {', '.join(self.loaded) or 'none'}")


def _adapted_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    model, block, layer = self.__dict__["_moekit_adapted"]
    return model.forward(block, layer, hidden_states, top_k_index, top_k_weights)


def _dense(block: MoEBlock) -> DenseBank:
    bank = block.bank()
    if not is_decorated(block.experts) or not hasattr(block.layout, "oriented") or not isinstance(bank, DenseBank):
        raise UnsupportedModelError(
            f"{type(block.experts).__name__} keeps its experts in a way that adapters cannot be stacked on: "
            "merge one adapter into this model instead"
        )
    return bank


def _parts(bank: DenseBank) -> list[str]:
    return [n for n in ("gate_up", "down", "gate_up_bias", "down_bias") if getattr(bank, n) is not None]


def _shapes(bank: DenseBank) -> dict[str, list[int]]:
    return {name: list(getattr(bank, name).shape[1:]) for name in _parts(bank)}
