"""Opening a compressed checkpoint so that it can be trained, and writing what training changed.

Everything that was not trained is copied byte for byte. Packed experts cannot be trained as they lie: they are decoded
into the family's own modules, around which routers learn; writing leaves the packed ones in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint, Writer, skeleton
from moekit.checkpoint.quantizer import METHOD, expand_layer
from moekit.checkpoint.shards import Lazy
from moekit.errors import OptionError
from moekit.formats import DenseBank
from moekit.stream import LoadedModel
from moekit.train.groups import chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "recovery.json"
_EXPERTS = {"experts", "scales"}


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether experts lie in moekit's own format."""
    return bool(checkpoint.scheme.config.get("quant_method") == METHOD)


def check_possible(checkpoint: Checkpoint, what: Sequence[str]) -> None:
    """OptionError where these parts of this checkpoint cannot be trained, or the result could not be written."""
    quantised = checkpoint.scheme.config.get("quant_method")
    experts = bool(_EXPERTS & set(what))
    if not is_packed(checkpoint):
        if quantised and experts:
            raise OptionError(
                f"{checkpoint.path} stores its experts as {quantised}: train the router and norms around them, or "
                "compress to a stock folder and recover that"
            )
        return
    for name, layer in checkpoint.scheme.config["layers"].items():
        if "rewrite" in layer:
            raise OptionError(
                f"{name} changes its routing at run time, which training cannot pass: recover before that"
            )
        if experts and -1 in expand_layer(layer)[1]:
            raise OptionError(
                f"{name} has router rows without an expert, which decoded experts cannot say: train the router only"
            )


def trainable(checkpoint: Checkpoint) -> tuple[PreTrainedModel, dict[str, list[int]]]:
    """The model in float32 with plain experts, and by layer the stored expert of each router row (packed only)."""
    model = LoadedModel.load(checkpoint, dtype=torch.float32).model
    if not is_packed(checkpoint):
        return model.requires_grad_(True), {}
    plain = skeleton.build(checkpoint.transformers_config, torch.float32)
    slots: dict[str, list[int]] = {}
    for name, layer in checkpoint.scheme.config["layers"].items():
        block = model.get_submodule(name)
        packed: Any = block.experts
        slots[name] = expand_layer(layer)[1]
        weights = [packed.bank.expert(max(0, slot)) for slot in slots[name]]
        bank = DenseBank.stack(weights, packed.bank.activation)
        experts = plain.get_submodule(name).experts.to_empty(device="cpu")
        block.experts = experts
        found = next(b for b in blocks(model) if b.name == name)
        own = found.bank()
        found.put(DenseBank(**{n: t.to(torch.float32) for n, t in bank.tensors().items()}, activation=own.activation))
    return model.requires_grad_(True), slots


def write(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    output: Path,
    what: Sequence[str],
    report: Mapping[str, Any],
    *,
    overwrite: bool = False,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> None:
    """The checkpoint with the trained tensors in the place of its own, published once it is whole (and passes)."""
    decoded = is_packed(checkpoint) and bool(_EXPERTS & set(what))
    parameters = dict(model.named_parameters())
    names = (
        list(parameters)
        if decoded
        else chosen(model, [part for part in what if part != "scales"] + ["experts"] * ("scales" in what))
    )
    trained = {name: parameters[name].detach() for name in names}
    trained |= {name: b for name, b in model.named_buffers() if decoded and name in model.state_dict()}
    replaced = revert_weight_conversion(model, trained)
    tensors = _tensors(checkpoint, replaced, decoded)
    config = dict(checkpoint.config)
    if decoded:
        config.pop("quantization_config", None)
    job = {"recovery": {key: report[key] for key in ("trained", "source", "of", "options")}}
    with Writer(output, source=checkpoint, job=job, overwrite=overwrite) as writer:
        if not writer.done("all"):
            writer.put("all", tensors)
        folder = writer.seal(config)
        reload = check(folder) if check is not None else None
        writer.write_file(REPORT, (json.dumps({**report, "reload": reload}, indent=1) + "\n").encode())
        writer.publish()


def _tensors(checkpoint: Checkpoint, replaced: Mapping[str, Tensor], decoded: bool) -> dict[str, Tensor | Lazy]:
    """What is written, by name: dtypes and shapes are the source's."""
    dtype = checkpoint.scheme.dtype
    if decoded:
        return {name: tensor.to(dtype).contiguous() for name, tensor in replaced.items()}
    unknown = [name for name in replaced if name not in checkpoint.tensors]
    if unknown:
        raise OptionError(f"{unknown[0]} was trained but {checkpoint.path} stores it in another form: train less")
    made: dict[str, Tensor | Lazy] = {}
    for name, info in checkpoint.tensors.items():
        if name in replaced:
            made[name] = replaced[name].to(info.dtype).contiguous()
        else:
            made[name] = Lazy(info.dtype, info.shape, partial(checkpoint.read, name))
    return made
