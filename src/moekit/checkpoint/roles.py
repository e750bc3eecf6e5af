"""What each parameter of a model is to its experts, found by asking the model class for one more expert.

The class is built twice on the meta device, with its own number of experts and with a larger one. Every parameter
whose shape differs has an axis that counts experts; every parameter that only the larger model has belongs to a list
of expert modules. Nothing here knows a family by name. Where that does not tell (the class cannot be built with
more, or grows otherwise), the blocks of the model itself do, and its number of experts stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from moekit.blocks import blocks
from moekit.errors import UnsupportedModelError

Shape = tuple[int, ...]

_LEAVES: tuple[tuple[str, str, bool], ...] = (
    (r"gate_up_proj|input_linear\.weight", "gate_up", False),
    (r"down_proj(\.weight)?|output_linear\.weight|wo\.weight|fc2\.weight|w2\.weight", "down", False),
    (r"up_proj(\.weight)?|wi\.weight|fc1\.weight|w3\.weight|mlp\.v1|down_embed\.weight", "up", False),
    (r"gate_proj(\.weight)?|w1\.weight|mlp\.w1", "gate", False),
    (r"mlp\.w2|up_embed\.weight", "down", True),
    (r"gate_up_proj_bias", "gate_up_bias", False),
    (r"up_proj_bias|up_proj\.bias|fc1\.bias", "up_bias", False),
    (r"down_proj_bias|down_proj\.bias|fc2\.bias", "down_bias", False),
)
"""Names of expert parameters inside an experts module: pattern, part, and whether it lies [in, out]."""
_BARE = re.compile(r"(.*)\.((?:input_linear|output_linear|up_embed|down_embed)\.weight)")
"""Expert parameters that lie on the block itself, without an experts module."""


@dataclass(frozen=True, slots=True)
class Role:
    """One parameter that depends on the number of experts.

    ``part`` is "row" for what surrounds the experts (router rows, selection biases). ``expert`` is the expert of a
    parameter that belongs to one, None where experts are stacked: then expert e has ``rows`` rows of ``axis``, from
    ``e * rows`` on, and ``tail`` rows follow the last expert. ``transposed``: it lies [in, out].
    """

    layer: str
    part: str
    expert: int | None = None
    axis: int = 0
    rows: int = 1
    tail: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Roles:
    """The role of every per-expert parameter; and each MoE layer's number of experts, by the path of the module that
    holds them, in the model's order. ``users``: how many routers choose from a layer's experts, where several do."""

    roles: Mapping[str, Role]
    counts: Mapping[str, int]
    users: Mapping[str, int] = field(default_factory=dict)


def find_roles(model: PreTrainedModel, larger: PreTrainedModel, step: int) -> Roles:
    """The roles in ``model``, given the same with ``step`` more experts.

    Raises:
        UnsupportedModelError: a parameter grows with the experts in a way that is not understood.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    others = {name: tuple(tensor.shape) for name, tensor in larger.state_dict().items()}
    grown = {name for name in shapes if name in others and others[name] != shapes[name]}
    listed = set(_of_lists(shapes, others))
    roles = {
        name: _listed(name) if name in listed else _stacked(name, shape, others[name], step)
        for name, shape in shapes.items()
        if name in listed or name in grown
    }
    counts: dict[str, int] = {}
    for name, role in roles.items():
        if role.part == "down":
            own = shapes[name][role.axis] // role.rows if role.expert is None else role.expert + 1
            counts[role.layer] = max(counts.get(role.layer, 0), own)
    return Roles({name: _complete(name, role, shapes[name], counts) for name, role in roles.items()}, counts)


def live_roles(model: PreTrainedModel, reason: UnsupportedModelError) -> Roles:
    """The roles of stacked experts alone, as the model's blocks have them: what surrounds experts has none.

    Raises:
        UnsupportedModelError: ``reason``, where the blocks are not understood either or their experts do not lie
            stacked.
    """
    try:
        found = blocks(model, shared=True)
    except UnsupportedModelError:
        raise reason from None
    users = Counter(id(block.experts) for block in found)
    held = {id(module): path for path, module in model.named_modules()}
    roles, counts, shared = dict[str, Role](), dict[str, int](), dict[str, int]()
    for block in found:
        layer = held[id(block.experts)].removesuffix(".experts")
        counts[layer], shared[layer] = block.num_experts, users[id(block.experts)]
        for name, parameter in block.experts.named_parameters():
            leaf = _leaf(name)
            if leaf is None or parameter.shape[:1] != (block.num_experts,):
                raise UnsupportedModelError(
                    f"{layer} keeps its {block.num_experts} experts in {name} {list(parameter.shape)}, which does not "
                    "lie expert by expert: such a model can be trained, profiled and run by transformers alone"
                )
            roles[f"{layer}.experts.{name}"] = Role(layer, leaf[0], transposed=leaf[1])
    return Roles(roles, counts, shared)


def _of_lists(shapes: Mapping[str, Shape], others: Mapping[str, Shape]) -> list[str]:
    """Parameters of expert modules kept in a list: their like appears more often in the larger model."""

    def like(name: str) -> str:
        return re.sub(r"(?<=\.experts\.)([a-z_]*)\d+", r"\1#", name)

    new = {like(name) for name in others if name not in shapes}
    return [name for name in shapes if like(name) in new]


def _listed(name: str) -> Role:
    match = re.fullmatch(r"(.*)\.experts\.[a-z_]*(\d+)\.(.*)", name)
    leaf = _leaf(match[3]) if match else None
    if match is None or leaf is None:
        raise UnsupportedModelError(f"{name} belongs to one expert of a list in a way moekit does not understand")
    return Role(match[1], leaf[0], int(match[2]), transposed=leaf[1])


def _stacked(name: str, shape: Shape, other: Shape, step: int) -> Role:
    axes = [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    if len(axes) != 1 or (other[axes[0]] - shape[axes[0]]) % step:
        raise UnsupportedModelError(f"{name} grows from {shape} to {other} with {step} more experts")
    rows = (other[axes[0]] - shape[axes[0]]) // step
    owner, _, tail = name.rpartition(".experts.")
    if not owner and (match := _BARE.fullmatch(name)):
        owner, tail = match[1], match[2]
    leaf = _leaf(tail) if owner else None
    if leaf is not None:
        return Role(owner, leaf[0], None, axes[0], rows, transposed=leaf[1])
    if (owner and not tail.startswith("router")) or rows != 1:
        raise UnsupportedModelError(f"{name} grows with the number of experts in a way moekit does not understand")
    return Role("", "row", None, axes[0], rows)


def _leaf(leaf: str) -> tuple[str, bool] | None:
    return next(((part, flip) for pattern, part, flip in _LEAVES if re.fullmatch(pattern, leaf)), None)


def _complete(name: str, role: Role, shape: Shape, counts: Mapping[str, int]) -> Role:
    """Fill in the layer a row tensor belongs to, and how many rows follow those of the experts."""
    layer = role.layer or max((path for path in counts if name.startswith(path + ".")), key=len, default="")
    if layer not in counts:
        raise UnsupportedModelError(f"{name} grows with the number of experts but belongs to no MoE layer")
    tail = shape[role.axis] - role.rows * counts[layer] if role.expert is None else 0
    return replace(role, layer=layer, tail=tail)
