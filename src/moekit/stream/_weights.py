"""Weights of a model on the meta device, brought from disk and taken away again, a few modules at a time.

transformers' own conversion does the mapping from what lies on disk (per expert, fused, transposed, renamed) to
parameters in memory, so every layout that ``from_pretrained`` knows is known here. That conversion reports trouble in
fields instead of raising; here every one of them is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moekit.checkpoint.bars import no_bars
from moekit.errors import CheckpointError

BITE = 64 * 2**20
"""Stored bytes converted in one call, unless one parameter alone has more: raw and converted copies coexist."""


class Source(Protocol):
    """Dense tensors by name, wherever they come from: ``nbytes`` and ``read`` of each, and a name for messages."""

    def names(self) -> Iterable[str]: ...
    def nbytes(self, name: str) -> int: ...
    def read(self, name: str) -> Tensor: ...


class _Pending:
    """What the conversion takes for a tensor on disk: reads it when it is indexed."""

    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name

    def __getitem__(self, _: object) -> Tensor:
        return self._source.read(self._name)


class Weights:
    """Parameters and persistent buffers of ``model`` by state-dict key: which are resident, and how to change that."""

    def __init__(self, model: PreTrainedModel, source: Source, device: torch.device, where: str) -> None:
        self.model, self.source, self.device, self.where = model, source, device, where
        self.meta: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self._mapping = get_model_conversion_mapping(model)
        self._sources, self._converted, self.ignored = self._group()
        self._tied = dict(getattr(model, "all_tied_weights_keys", {}))
        self._lock = threading.Lock()
        dtype = model.dtype
        self._config = LoadStateDictConfig(
            weight_mapping=self._mapping,
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": device},
        )

    def _group(self) -> tuple[dict[str, list[str]], set[str], list[str]]:
        """State-dict key -> the stored tensors it is made of; the keys that more than a name is changed of; and the
        stored tensors this model has no place for."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix, sources, ignored = self.model.base_model_prefix, dict[str, list[str]](), list[str]()
        converted: set[str] = set()
        for name in sorted(self.source.names(), key=dot_natural_key):
            key, pattern = rename_source_key(name, renamings, converters, prefix, self.meta)
            if key not in self.meta and name in self.meta:
                key, pattern = rename_source_key(name, [], [], prefix, self.meta)
            if key in self.meta:
                sources.setdefault(key, []).append(name)
                converted |= set() if pattern is None else {key}
            else:
                ignored.append(name)
        return sources, converted, ignored

    def _origin(self, key: str) -> str:
        """The key that is stored: ``key`` itself, or the one it shares its tensor with."""
        if key in self._sources or key not in self._tied.keys() | set(self._tied.values()):
            return key
        root = self._tied.get(key, key)
        group = [root, *(target for target, source in self._tied.items() if source == root)]
        return next((member for member in group if member in self._sources), key)

    def load(self, keys: Iterable[str]) -> None:
        """Make ``keys`` resident on the device.

        Raises:
            CheckpointError: a tensor is missing, has another shape than the configuration says, or cannot be converted.
        """
        with self._lock, no_bars():
            keys = list(keys)
            origins = {key: self._origin(key) for key in keys}
            for bite in self._bites(dict.fromkeys(origins.values())):
                pending = {name: _Pending(self.source, name) for key in bite for name in self._sources[key]}
                info, _ = convert_and_load_state_dict_in_model(self.model, pending, self._config)
                self._check(info)
            for key, origin in origins.items():
                if key != origin:
                    _assign(self.model, key, _tensor(self.model, origin))
            for origin in set(origins.values()) - set(keys):
                _assign(self.model, origin, self.meta[origin])
            if absent := [key for key in keys if _tensor(self.model, key).is_meta]:
                raise CheckpointError(
                    f"{self.where} has nothing for {absent[0]}"
                    + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
                    + ", which its configuration asks for: the checkpoint is incomplete or of another model"
                )

    def free(self, keys: Iterable[str]) -> None:
        """Forget ``keys``: their tensors go as soon as nobody else holds them."""
        for key in keys:
            _assign(self.model, key, self.meta[key])

    def _bites(self, keys: Iterable[str]) -> Iterator[list[str]]:
        """Those of ``keys`` that are stored, a few at a time."""
        bite, size = list[str](), 0
        for key in keys:
            if key not in self._sources:
                continue
            more = self._read_bytes(key)
            if bite and size + more > BITE:
                yield bite
                bite, size = [], 0
            bite, size = [*bite, key], size + more
        if bite:
            yield bite

    def _read_bytes(self, key: str) -> int:
        return sum(self.source.nbytes(name) for name in self._sources[key])

    def _check(self, info: Any) -> None:
        for key, found, expected in sorted(info.mismatched_keys):
            raise CheckpointError(
                f"{self.where}: {key} has shape {list(found)}, its configuration asks for {list(expected)}"
            )
        for key, message in sorted(info.conversion_errors.items()):
            raise CheckpointError(f"{self.where}: {key} cannot be assembled: {str(message).strip().splitlines()[-1]}")
        for key in sorted(info.unexpected_keys):
            raise CheckpointError(f"{self.where}: {key} has no place in the model its configuration describes")

    def resident_bytes(self, keys: Iterable[str]) -> int:
        """Bytes ``keys`` take once loaded."""
        return sum(self._size(key) for key in {id(self.meta[key]): key for key in keys}.values())

    def loading_bytes(self, keys: Iterable[str]) -> int:
        """Most bytes held while ``keys`` are loaded, themselves included: what was made before, and one bite with what
        it is made of."""
        held = most = 0
        for bite in self._bites(dict.fromkeys(self._origin(key) for key in keys)):
            most = max(most, held + sum(self._making_bytes(key) for key in bite))
            held += sum(self._made_bytes(key) for key in bite)
        return most

    def _making_bytes(self, key: str) -> int:
        """Each step of a conversion holds what it works on, already in the wanted dtype, and what it makes; a tensor
        that is only cast is there twice, one that only gets another name once."""
        made, read = self._made_bytes(key), self._read_bytes(key)
        if key in self._converted:
            return 2 * made
        return made if read == made else made + read

    def _made_bytes(self, key: str) -> int:
        """Of the parameter, and of others that are cut from the same stored tensor."""
        return max(self._size(key), self._read_bytes(key)) if key in self._converted else self._size(key)

    def _size(self, key: str) -> int:
        return self.meta[key].numel() * self.meta[key].element_size()


def _tensor(model: nn.Module, key: str) -> Tensor:
    owner, _, name = key.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _assign(model: nn.Module, key: str, value: Tensor) -> None:
    owner, _, name = key.rpartition(".")
    setattr(model.get_submodule(owner), name, value)


def keys_under(names: Mapping[str, object] | Iterable[str], module: str) -> list[str]:
    """The state-dict keys that belong to ``module`` or anything inside it."""
    prefix = f"{module}." if module else ""
    return [name for name in names if name.startswith(prefix)]
