"""The MoE layers of a checkpoint: which tensors on disk hold which expert, and which surround the experts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from moekit.checkpoint.extra import by_analogy, dots
from moekit.checkpoint.names import EXPERT_INDEX, NameMap, Target
from moekit.checkpoint.roles import Role
from moekit.checkpoint.storage import Stored
from moekit.checkpoint.structure import LayerShape, Structure
from moekit.errors import CheckpointError, UnsupportedModelError

_SEVERAL = "ErnieFuseAndSplitTextVisionExperts"
"""The one conversion that deals a list of experts out to several modules, in equal runs."""
_KNOWN = {"MergeModulelist", "Concatenate", "Transpose", "TransposeIfNeeded", "Interleave", "Chunk", "Canonical"}

_SHARED = re.compile(r"\.shared?_")
"""Shared experts lie beside the experts: ``shared_experts``, ``shared_expert_gate``, ``shared_mlp``."""


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One weight on disk that holds experts.

    ``name``: its tensor (the carrier, if quantised; ``stored`` names the companions). ``expert``: the one it belongs
    to, or None where all are stacked: then expert e is rows ``e * rows`` to ``(e + 1) * rows`` of axis 0. ``part``:
    gate, up, gate_up, down, or one of these with ``_bias``. ``transposed``: a matrix lies [in, out];
    ``interleaved``: gate and up rows alternate.
    """

    name: str
    expert: int | None
    part: str
    stored: Stored
    rows: int = 1
    transposed: bool = False
    interleaved: bool = False
    plain_transposed: bool = False
    """As ``transposed``, for the plain weight that a quantised one stands for."""
    canonical: bool = False
    """Stored in moekit's own format, whose names are not the family's."""
    run: int = 0
    """Number of whole expert counts before this module's experts in the list on disk (several modules, one list)."""


@dataclass(frozen=True, slots=True)
class RowTensor:
    """A tensor with one row per expert along ``axis`` (router weights, selection biases).

    ``rows`` is the number of experts the router chooses from; rows beyond it (shared or zero experts, a skip class)
    stay at the tail.
    ``part``: the index on axis 0 that is this layer's, where one tensor serves several layers.
    """

    name: str
    axis: int
    rows: int
    part: int | None = None


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer on disk. ``name`` is that of its live block, ``layer`` the index of its decoder layer.

    ``num_experts`` is how many are stored: in moekit's format that may differ from what the router chooses from.
    ``groups``: (number of groups, groups chosen) where routing is group-limited. ``extra``: a prediction layer that
    transformers ignores. ``shared``: tensors of the shared experts.
    """

    name: str
    layer: int
    num_experts: int
    top_k: int
    groups: tuple[int, int] | None
    extra: bool
    expert_tensors: tuple[ExpertTensor, ...]
    row_tensors: tuple[RowTensor, ...]
    shared: tuple[str, ...]
    shape: LayerShape = field(repr=False)

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    @property
    def intermediate_size(self) -> int:
        return self.shape.intermediate_size

    @property
    def users(self) -> int:
        return self.shape.users

    def of(self, expert: int) -> Iterator[ExpertTensor]:
        """The tensors that hold one expert (stacked ones hold them all)."""
        return (t for t in self.expert_tensors if t.expert in (None, expert))


@dataclass
class _Found:
    experts: list[ExpertTensor] = field(default_factory=list)
    rows: list[RowTensor] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    def extend(self, other: _Found) -> None:
        self.experts += other.experts
        self.rows += other.rows
        self.shared += other.shared


@dataclass(frozen=True)
class Classified:
    """Every weight on disk: its MoE layers, the parameter each stored weight becomes, and the extra weights."""

    layers: tuple[MoELayer, ...]
    parameters: Mapping[str, str]
    extra: frozenset[str]


def classify(
    stored: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    model: Structure,
    counts: Mapping[str, int] | None = None,
) -> Classified:
    """Sort the stored weights, given the shape of each one's carrier.

    ``counts``: how many experts a layer stores, where that is not what its router chooses from (moekit's format).
    """
    names = NameMap(model.model)
    model = _with_counts(model, counts or {})
    targets = {name: names.target(name) for name in sorted(stored, key=_natural)}
    parameters = {name: target.parameter for name, target in targets.items() if target.parameter in names}
    found: dict[str, _Found] = defaultdict(_Found)
    owners = _owners(model.layers)
    for name in parameters:
        _place(found, owners, stored[name], shapes[name], targets[name], model)
    _complain_of_absent(model, found)
    layers = [_layer(model.layers[name], found[name], extra=False) for name in model.layers if found[name].experts]
    unknown = [name for name in targets if name not in parameters]
    extra = by_analogy(unknown, targets, parameters, model)
    beyond: dict[str, _Found] = defaultdict(_Found)
    for name, (key, like) in extra.items():
        one: dict[str, _Found] = defaultdict(_Found)
        _place(one, owners, stored[name], shapes[name], like, model)
        for entry in one.values():
            beyond[key].extend(entry)
    last = list(model.layers.values())[-1]
    layers += [
        _layer(replace(last, name=key, layer=int(re.findall(r"\d+", key)[-1])), entry, extra=True)
        for key, entry in beyond.items()
        if entry.experts
    ]
    return Classified(tuple(layers), parameters, frozenset(unknown))


def _with_counts(model: Structure, counts: Mapping[str, int]) -> Structure:
    layers = {
        name: replace(shape, num_experts=counts.get(name, shape.num_experts)) for name, shape in model.layers.items()
    }
    return replace(model, layers=layers)


def _complain_of_absent(model: Structure, found: Mapping[str, _Found]) -> None:
    """Every MoE layer of the model has experts on disk, or shares those of another (tied weights)."""
    tied = {model.roles[name].layer for name in model.model.all_tied_weights_keys if name in model.roles}
    absent = [name for name in model.layers if name not in tied and not (name in found and found[name].experts)]
    if absent:
        raise CheckpointError(
            f"no expert of {absent[0]} is on disk ({len(absent)} of {len(model.layers)} MoE layers are absent): "
            "the checkpoint is incomplete, or its tensors are named in a way transformers does not know"
        )


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _owners(layers: Iterable[str]) -> dict[str, str]:
    """The MoE layer that shared experts inside a module accompany: it, or the first inside that module."""
    owners: dict[str, str] = {}
    for name in layers:
        for dot in (*dots(name), len(name)):
            if re.search(r"\.\d+(\.|$)", name[:dot]):
                owners.setdefault(name[:dot], name)
    return owners


def _place(
    found: dict[str, _Found],
    owners: Mapping[str, str],
    stored: Stored,
    shape: tuple[int, ...],
    target: Target,
    model: Structure,
) -> None:
    """Enter one stored weight under the MoE layer it belongs to, if any."""
    role = model.roles.get(target.parameter)
    if role is None:
        shared = _SHARED.search(target.parameter)
        if shared and (layer := owners.get(target.parameter[: shared.start()])):
            found[layer].shared.extend(stored.tensors.values())
        return
    strange = set(target.operations) - _KNOWN - {_SEVERAL}
    if strange:
        raise UnsupportedModelError(f"{stored.name} is converted by {', '.join(strange)}, which moekit does not know")
    if role.part == "row":
        for part, parameter in enumerate(target.targets or (target.parameter,)):
            row = model.roles[parameter]
            axis = len(shape) - 1 - row.axis if "Transpose" in target.operations else row.axis
            count = shape[axis] - row.tail
            found[row.layer].rows.append(RowTensor(stored.name, axis, count, part if len(target.targets) > 1 else None))
        return
    expert, run = _index(stored.name, role), 0
    count = model.layers[role.layer].num_experts
    if expert is not None and _SEVERAL in target.operations:
        run, expert = divmod(expert, count)
        role = model.roles[target.targets[run]]
    if expert is None or expert < count:
        layer_shape = model.layers[role.layer]
        found[role.layer].experts.append(_expert(stored, shape, target, role, layer_shape, expert, run))


def _index(name: str, role: Role) -> int | None:
    match = EXPERT_INDEX.search(name)
    return int(match[2]) if match else role.expert


def _expert(
    stored: Stored,
    shape: tuple[int, ...],
    target: Target,
    role: Role,
    layer: LayerShape,
    expert: int | None,
    run: int,
) -> ExpertTensor:
    part = role.part
    if part.startswith("gate_up") and target.sources == 2:
        part = part.replace("gate_up", ("gate", "up")[target.source])
    transposed = layer.transposed or role.transposed
    turned = "TransposeIfNeeded" in target.operations and shape[-2:] != _expected(role, layer)
    if turned or "Transpose" in target.operations:
        transposed = not transposed
    plain = transposed and not part.endswith("_bias")
    if stored.carrier != "weight" or part.endswith("_bias"):
        transposed = False
    interleaved = part.startswith("gate_up") and (layer.interleaved or "Interleave" in target.operations)
    canonical = "Canonical" in target.operations
    if canonical:
        plain = transposed = interleaved = False
    rows = role.rows if expert is None else 1
    name = stored.tensors[stored.carrier]
    return ExpertTensor(name, expert, part, stored, rows, transposed, interleaved, plain, canonical, run)


def _expected(role: Role, layer: LayerShape) -> tuple[int, int]:
    """The shape of one expert's matrix in memory."""
    first = layer.intermediate_size * (2 if role.part == "gate_up" and layer.gated else 1)
    shape = (layer.hidden_size, layer.intermediate_size) if role.part == "down" else (first, layer.hidden_size)
    return (shape[1], shape[0]) if layer.transposed else shape


def _layer(shape: LayerShape, found: _Found, *, extra: bool) -> MoELayer:
    return MoELayer(
        name=shape.name,
        layer=shape.layer,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        groups=shape.groups,
        extra=extra,
        expert_tensors=tuple(found.experts),
        row_tensors=tuple(found.rows),
        shared=tuple(found.shared),
        shape=shape,
    )
