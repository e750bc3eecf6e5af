"""A model on disk: what is where, down to the single expert, readable without loading the rest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moekit.bank import Activation
from moekit.checkpoint import banks, remote, resolve, skeleton
from moekit.checkpoint.headers import TensorInfo, join_headers, read_header
from moekit.checkpoint.layers import Classified, ExpertTensor, MoELayer, classify
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.scheme import REWRITE, Scheme, stored_bank
from moekit.checkpoint.storage import Stored, group
from moekit.checkpoint.structure import Structure, structure
from moekit.checkpoint.summary import Summary, summarise
from moekit.errors import CheckpointError
from moekit.formats import DenseBank

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "sentencepiece*", "tekken*")


class Checkpoint:
    """One model on disk. Opening reads config and headers only; every later read fetches just the bytes it names.

    ``path``: its folder; ``config``: config.json as it stands; ``tensors``: where each tensor lies, by its name on
    disk; ``stored``: the same grouped into weights (a quantised weight with its scales), by plain name.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo], reader: Reader | None = None
    ) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self.stored: Mapping[str, Stored] = group(tensors)
        self._reader = reader or Reader(path, tensors)

    @classmethod
    def open(cls, ref: str | os.PathLike[str]) -> Checkpoint:
        """A folder, a hub id in the local cache, or ``moekit:NAME``. Never uses the network.

        Raises:
            CheckpointError: no model, or files that are missing, truncated, corrupt or contradict each other.
        """
        path = resolve.resolve(ref)
        config = resolve.read_json(path / "config.json")
        files, index = resolve.weight_files(path)
        return cls(path, config, join_headers(path, {file: read_header(path / file) for file in files}, index))

    @classmethod
    def open_headers(cls, ref: str | os.PathLike[str]) -> Checkpoint:
        """As :meth:`open`; a hub id that is not cached is known by config and headers, fetched from ``HF_ENDPOINT``.

        Such a checkpoint can be inspected and planned for, and raises :class:`CheckpointError` when read.
        """
        text = os.fspath(ref)
        if not resolve.is_hub_id(text) or resolve.is_local(text):
            return cls.open(ref)
        config, headers, index = remote.fetch_headers(text)
        tensors = join_headers(Path(text), headers, index)
        return cls(Path(text), config, tensors, remote.HeadersOnly(text, tensors))

    @property
    def is_remote(self) -> bool:
        """Whether only headers are at hand."""
        return isinstance(self._reader, remote.HeadersOnly)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def counted_bytes(self) -> int:
        """Bytes of tensor data read so far."""
        return self._reader.counted_bytes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of config and headers: two checkpoints that share it have the same tensors in the same places."""
        entries = [
            [i.name, i.file, str(i.dtype), list(i.shape), i.offset]
            for i in sorted(self.tensors.values(), key=lambda info: info.name)
        ]
        return hashlib.sha256(json.dumps([self.config, entries], sort_keys=True).encode()).hexdigest()

    @cached_property
    def transformers_config(self) -> PretrainedConfig:
        """The config as transformers understands it."""
        return skeleton.load_config(str(self.path), self.config)

    @cached_property
    def structure(self) -> Structure:
        """The experts of the model class, on the meta device. Its model is shared: take :meth:`skeleton` to change."""
        return structure(self.transformers_config)

    @cached_property
    def classified(self) -> Classified:
        """What each weight on disk is to the model."""
        known = {name: stored for name, stored in self.stored.items() if REWRITE not in name}
        shapes = {name: self.tensors[stored.tensors[stored.carrier]].shape for name, stored in known.items()}
        return classify(known, shapes, self.structure, self.scheme.counts)

    @property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """The MoE layers in order, prediction layers (``extra``) last.

        Raises:
            CheckpointError: a dense model. UnsupportedModelError: a family whose experts are not understood.
        """
        return self.classified.layers

    @property
    def fixed_count(self) -> str | None:
        """Why this family's number of experts cannot be changed, or None where it can."""
        return self.structure.fixed_count

    @property
    def own_class(self) -> bool:
        """Whether the model's class is moekit's own, which transformers knows once moekit is imported."""
        return type(self.transformers_config).__module__.split(".")[0] == __name__.split(".")[0]

    def layer(self, name: str) -> MoELayer:
        """The MoE layer of that name."""
        for layer in self.moe_layers:
            if layer.name == name:
                return layer
        raise CheckpointError(f"{self.path} has no MoE layer {name}; its first is {self.moe_layers[0].name}")

    def summary(self) -> Summary:
        """Sizes, from headers alone."""
        return summarise(self)

    def read(self, name: str) -> Tensor:
        """One tensor as stored, in fresh memory."""
        return self._reader.read(name)

    def read_expert(self, layer: str, expert: int) -> dict[str, Tensor]:
        """One expert's tensors as stored, under the names on disk, without reading any other expert.

        Where a tensor stacks all experts, its name stands for the slice of this one, without the stacking axis.
        """
        found: dict[str, Tensor] = {}
        moe = self.layer(layer)
        banks.check_experts(moe, [expert])
        for tensor in moe.of(expert):
            for name in tensor.stored.tensors.values():
                found[name] = banks.own(self._reader, name, tensor, expert)
        return found

    def read_plain(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One weight by its plain name (a key of ``stored``), decoded if it is quantised, in the layout that the
        family has on disk without quantisation."""
        return banks.plain(self._reader, self.scheme, self._entry(name), self.expert_tensor(name), dtype)

    def bank(self, layer: str, experts: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> DenseBank:
        """The experts of a layer (all, or those named, in that order) in canonical orientation, decoded.

        ``dtype`` None: as stored, or the config's dtype for quantised weights.
        """
        moe = self.layer(layer)
        return banks.read_bank(self._reader, self.scheme, moe, self._activation(moe), experts, dtype)

    def stored_bank(self, layer: str, device: str = "cpu") -> Any:
        """The experts of a layer in moekit's own format, as they are stored; on the meta device nothing is read."""
        moe = self.layer(layer)
        return stored_bank(self._reader, self.scheme, moe, self._activation(moe), None, device)

    def write_bank(self, layer: str, bank: DenseBank) -> dict[str, Tensor]:
        """The tensors that hold ``bank`` in this family's names and layout: the inverse of :meth:`bank`, bit for bit.

        Any number of experts. A quantised source is written unquantised, as the family stores plain weights.
        """
        return banks.write_bank(self._reader, self.layer(layer), bank, self.structure.model)

    def rename_expert(self, name: str, new_index: int, num_experts: int | None = None) -> str:
        """The name of the same tensor of expert ``new_index``; ``num_experts`` is the new count, needed only where
        several modules share one list of experts."""
        tensor = self.expert_tensor(name)
        return banks.rename_index(name, new_index + (tensor.run * (num_experts or 0) if tensor else 0))

    @cached_property
    def scheme(self) -> Scheme:
        """How this checkpoint is quantised; empty if it is not."""
        quantisation = self.config.get("quantization_config") or self.config.get("compression_config") or {}
        dtype = self.transformers_config.dtype
        return Scheme(quantisation, dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A fresh model of the right class on the meta device; packed layers have packed experts and their masks."""
        from moekit.checkpoint import quantizer

        model = skeleton.build(self.transformers_config, dtype)
        if self.scheme.config.get("quant_method") == quantizer.METHOD:
            quantizer.pack_layers(model, self.scheme.config["layers"])
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights.

        Raises:
            CheckpointError: there is none that can be loaded.
        """
        if not any(True for pattern in _TOKENIZER_FILES for _ in self.path.glob(pattern)):
            # transformers would return an empty tokenizer of the family's class instead
            raise CheckpointError(f"{self.path} has no tokenizer: no file beside the weights describes one")
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.path} has no tokenizer that transformers can load: {first}") from None

    def check(self) -> None:
        """That every expert of every MoE layer is there, whole.

        Raises:
            CheckpointError: naming the first tensor that is missing.
        """
        for layer in self.moe_layers:
            banks.check_whole(layer)

    def scan_finite(self, names: Iterable[str] | None = None) -> None:
        """Read the named tensors (all if None) and refuse NaN and infinite values.

        Raises:
            CheckpointError: naming the first tensor that holds one.
        """
        for name in self.tensors if names is None else names:
            info = self._reader.info(name)
            if not info.dtype.is_floating_point or info.dtype.itemsize == 0:
                continue
            for chunk in self._reader.chunks(name):
                bad = ~torch.isfinite(chunk.float() if chunk.dtype.itemsize == 1 else chunk)
                if bad.any():
                    kind = "NaN" if torch.isnan(chunk[bad].float()).any() else "infinite values"
                    raise CheckpointError(f"{name} in {info.file} holds {kind}: the weights are damaged")

    def expert_tensor(self, name: str) -> ExpertTensor | None:
        """What a tensor (or plain weight) of that name holds of the experts, if it holds any."""
        found = self._expert_tensors.get(name)
        return found[0] if found else None

    def layer_of(self, name: str) -> MoELayer | None:
        """The MoE layer whose experts a tensor (or plain weight) holds, if it holds any."""
        found = self._expert_tensors.get(name)
        return found[1] if found else None

    def _entry(self, name: str) -> Stored:
        if name not in self.stored:
            raise CheckpointError(f"{self.path} has no weight {name}")
        return self.stored[name]

    @cached_property
    def _expert_tensors(self) -> dict[str, tuple[ExpertTensor, MoELayer]]:
        found = {}
        for layer in self.moe_layers:
            for tensor in layer.expert_tensors:
                for name in (tensor.stored.name, *tensor.stored.tensors.values()):
                    found[name] = (tensor, layer)
        return found

    def _activation(self, layer: MoELayer) -> Activation:
        """What the family computes between the two matrices; an extra layer does as the last layer of the trunk."""
        found = {block.name: block for block in self._blocks}
        trunk = [one.name for one in self.moe_layers if not one.extra]
        return found[layer.name if layer.name in found else trunk[-1]].bank().activation

    @cached_property
    def _blocks(self) -> list[Any]:
        from moekit.blocks import blocks

        return blocks(self.structure.model)
