"""The quantisation method "moekit": a packed checkpoint loads by plain ``from_pretrained`` after ``import moekit``.

``quantization_config`` in config.json: ``{"quant_method": "moekit", "version": 1, "layers": {NAME: LAYER}}``. NAME is
the module path of a Mixture-of-Experts block; layers that are not named are stock. LAYER describes a stored bank (the
``describe()`` of a class in ``formats.FORMATS``; "experts" is their number),
plus "slots" where router row s does not simply call stored expert s (-1: the row is masked), and "rewrite" where the
routing is changed at run time (``kernels.rewrites``).
The experts run on the packed weights; nothing is expanded at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moekit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "moekit"
VERSION = 1
_SHORT = ("bits", "group_size")
"""Lists with an entry per expert that are written once where all entries are equal."""


def describe_layer(bank: Any, slots: Sequence[int], rewrite: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """LAYER for a stored bank, its slots and its rewrite, as short as it can be said."""
    count, described = bank.num_experts, bank.describe()
    layer: dict[str, Any] = {"experts": count, **described}
    for key in _SHORT:
        if key in described and len(set(described[key])) == 1:
            layer[key] = described[key][0]
    if list(slots) != list(range(count)):
        layer["slots"] = list(slots)
    return layer if rewrite is None else {**layer, "rewrite": dict(rewrite)}


def expand_layer(layer: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The inverse: (what ``formats.allocate`` takes, slots)."""
    bank = {key: value for key, value in layer.items() if key not in ("experts", "slots", "rewrite")}
    for key in _SHORT:
        if key in bank and not isinstance(bank[key], list):
            bank[key] = [bank[key]] * layer["experts"]
    return bank, list(layer.get("slots", range(layer["experts"])))


def pack_layers(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a model of the stock class ready for packed weights: its experts swapped, its router rows masked."""
    swap_experts(model, layers)
    mask_rows(model, layers)


def swap_experts(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty packed experts (same device as the model's, meta included) in place of the family's own.

    Raises:
        CheckpointError: a layer that the model does not have.
    """
    from moekit.kernels import BankExperts

    for name, layer in layers.items():
        parent = _block(model, name)
        bank, slots = expand_layer(layer)
        plain = slots == list(range(layer["experts"]))
        parent.experts = BankExperts.like(parent.experts, bank, None if plain else slots, layer.get("rewrite"))


def mask_rows(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Forbid the router rows whose slot is -1, for as long as the model lives."""
    from moekit.blocks import blocks

    masked = {name: slots for name, layer in layers.items() if -1 in (slots := expand_layer(layer)[1])}
    if not masked:
        return
    found = {block.name: block for block in blocks(model)}
    for name, slots in masked.items():
        block = found.get(name) or found[_without_prefix(model, name)]
        block.mask([row for row, slot in enumerate(slots) if slot >= 0]).attach()


def _block(model: PreTrainedModel, name: str) -> Any:
    for path in (name, _without_prefix(model, name)):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise CheckpointError(
        f"quantization_config names a layer {name}, which {type(model).__name__} does not have; "
        "the folder's config.json and weights do not belong together"
    )


def _without_prefix(model: PreTrainedModel, name: str) -> str:
    """The same module seen from the base model (``AutoModel`` instead of ``AutoModelForCausalLM``)."""
    return name.removeprefix(f"{model.base_model_prefix}.")


@register_quantization_config(METHOD)
class MoekitConfig(QuantizationConfigMixin):
    """What config.json says about packed layers; see the module's text."""

    def __init__(self, layers: Mapping[str, Any] | None = None, version: int = VERSION, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.layers = dict(layers or {})
        self.version = version
        if version != VERSION:
            raise CheckpointError(f"packed with moekit format {version}; this moekit reads format {VERSION}: update it")


@register_quantizer(METHOD)
class MoekitQuantizer(HfQuantizer):
    """Swaps experts before the weights load, and masks router rows after."""

    quantization_config: MoekitConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "experts are packed by moekit compress or moekit.prepare, not by from_pretrained: "
                "load without quantization_config"
            )
        swap_experts(model, self.quantization_config.layers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        mask_rows(model, self.quantization_config.layers)
        # Packed experts have no backward; a plain ``model(x)`` must run all the same.
        model.requires_grad_(False)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
