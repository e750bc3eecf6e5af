"""From a dense family to a stock Mixture-of-Experts family that computes the same around its feed-forward layers.

Which families could be siblings is a table; whether they are, for this config and this form, is found by looking: the
sibling is built on the meta device, and every parameter outside the layers that gain experts must have the name and
the shape it has in the dense model. That the sibling also *computes* the same is for the builder to check by running.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from moekit.blocks import blocks
from moekit.checkpoint import skeleton
from moekit.checkpoint.structure import LayerShape, structure
from moekit.errors import MoekitError, UnsupportedModelError

SIBLINGS: dict[str, tuple[str, ...]] = {
    "ernie4_5": ("ernie4_5_moe",),
    "granite": ("granitemoe", "granitemoeshared"),
    "llama": ("mixtral", "glm4_moe"),
    "mistral": ("mixtral",),
    "olmo2": ("flex_olmo",),
    "qwen3": ("qwen3_moe", "dots1"),
}
"""Dense model type -> Mixture-of-Experts model types with its attention, in the order they are tried."""
_UNFIT = {"architectures", "transformers_version", "model_type", "dtype", "auto_map"}


@dataclass(frozen=True, kw_only=True)
class MoEForm:
    """The layers that gain experts and what they shall look like.

    ``normalised``: the weights of the chosen experts sum to 1, so that equal experts are one expert. ``shared``: one
    more expert of the same size that every token passes, with weight 1.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    intermediate_size: int
    normalised: bool = True
    shared: bool = False


def sibling_config(dense: PretrainedConfig, form: MoEForm) -> PretrainedConfig:
    """The config of the stock family that can hold ``dense`` in this form.

    Raises:
        UnsupportedModelError: there is none; the message says which were tried and what stood in the way.
    """
    tried = []
    for kind in SIBLINGS.get(dense.model_type, ()):
        if kind not in CONFIG_MAPPING:
            continue
        try:
            config = _translated(dense, CONFIG_MAPPING[kind], form)
            problem = next(_problems(dense, config, form), None)
        except (MoekitError, TypeError, ValueError, AttributeError) as error:
            problem = (" ".join(str(error).split()) or type(error).__name__)[:120]
        if problem is None:
            return config
        tried.append(f"{kind} ({problem})")
    found = "; ".join(tried) or "none is known"
    raise UnsupportedModelError(
        f"no stock Mixture-of-Experts family holds a {dense.model_type} model with {_words(form)}: tried {found}"
    )


def _translated(dense: PretrainedConfig, cls: type[PretrainedConfig], form: MoEForm) -> PretrainedConfig:
    """What both kinds of config call the same is taken over; what only one has is set to the form."""
    accepted = set(inspect.signature(cls).parameters) - _UNFIT
    said = {name: value for name, value in dense.to_dict().items() if name in accepted}
    layers, chosen = dense.num_hidden_layers, set(form.layers)
    first = min(chosen, default=0)
    wanted: dict[str, Any] = {
        **dict.fromkeys(skeleton.COUNT_FIELDS, form.num_experts),
        **dict.fromkeys(skeleton.GROUP_FIELDS, 1),
        "topk_group": 1,
        "num_experts_per_tok": form.top_k,
        "moe_k": form.top_k,
        "moe_intermediate_size": form.intermediate_size,
        "norm_topk_prob": form.normalised,
        "n_shared_experts": int(form.shared),
        "num_shared_experts": int(form.shared),
        "moe_num_shared_experts": int(form.shared),
        "shared_intermediate_size": form.intermediate_size if form.shared else 0,
        "routed_scaling_factor": 1.0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(layers) if i not in chosen],
        "first_k_dense_replace": first,
        "mlp_layer_types": ["sparse" if i in chosen else "dense" for i in range(layers)],
        "use_qk_norm": False,
    }
    said |= {name: value for name, value in wanted.items() if name in accepted}
    rope = said.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # families that turn a part of each head say so by default
        said["rope_parameters"] = {"partial_rotary_factor": 1.0, **rope}
    if "moe_intermediate_size" not in accepted:
        said["intermediate_size"] = form.intermediate_size
    return cls(**said)


def _problems(dense: PretrainedConfig, config: PretrainedConfig, form: MoEForm) -> Iterator[str]:
    """What keeps a family from being the sibling, most telling first."""
    found = structure(config)
    at = tuple(shape.layer for shape in found.layers.values())
    if at != tuple(sorted(form.layers)):
        yield f"it would have experts in layers {list(at)}"
    for shape in found.layers.values():
        yield from _shape_problems(shape, form)
    for block in blocks(found.model):
        recipe = block.router.recipe
        if form.normalised and form.top_k > 1 and recipe.weights != "softmax" and recipe.normalise is None:
            yield "its weights do not sum to 1"
        if not form.normalised and (recipe.weights == "softmax" or recipe.normalise is not None):
            yield "it normalises the weights of the chosen"
        if bool(block.shared) != form.shared:
            yield "its layers have a shared expert" if block.shared else "its layers have no shared expert"
        if any("gate" in name.split(".")[0] and "proj" not in name for name in _shared_names(block.module)):
            yield "its shared expert has a gate of its own"
    yield from _differences(dense, config, tuple(found.layers))


def _shape_problems(shape: LayerShape, form: MoEForm) -> Iterator[str]:
    if (shape.num_experts, shape.top_k) != (form.num_experts, form.top_k):
        yield f"it would have {shape.num_experts} experts, top-{shape.top_k}"
    if shape.intermediate_size != form.intermediate_size:
        yield f"its experts would be {shape.intermediate_size} wide"
    if shape.biased:
        yield "its experts have biases"


def _shared_names(module: Any) -> list[str]:
    return [name.removeprefix("shared_expert_") for name, _ in module.named_children() if "shared_expert_" in name]


def _differences(dense: PretrainedConfig, config: PretrainedConfig, owners: tuple[str, ...]) -> Iterator[str]:
    """Parameters outside the layers with experts that the two do not share."""

    def outside(one: PretrainedConfig) -> dict[str, tuple[int, ...]]:
        parameters = skeleton.build(one).state_dict()
        mlps = tuple(f"{owner.rpartition('.')[0]}." for owner in owners)
        return {n: tuple(t.shape) for n, t in parameters.items() if not (n.startswith(mlps) and _feed_forward(n))}

    mine, theirs = outside(dense), outside(config)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            yield f"{name} is {mine.get(name, 'absent')} here, {theirs.get(name, 'absent')} there"


def _feed_forward(name: str) -> bool:
    return any(part in name for part in (".mlp.", ".block_sparse_moe.", ".feed_forward.", ".shared_mlp."))


def _words(form: MoEForm) -> str:
    words = f"{form.num_experts} experts of width {form.intermediate_size}, top-{form.top_k}"
    words += ", weights that sum to 1" if form.normalised else ", raw weights"
    return words + (", a shared expert" if form.shared else "") + f", in layers {list(form.layers)}"
