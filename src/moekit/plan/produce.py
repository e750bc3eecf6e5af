"""From a source and a plan to every tensor of the output: one pure description that both apply and verify follow.

Nothing is read to describe; every tensor is a :class:`~moekit.checkpoint.shards.Lazy`, made when it is asked for. Each
tensor of the source has a :class:`Fate`, and an assertion holds that none lacks one.

A source in a quantised layout (FP8 blocks, MXFP4, compressed-tensors) is copied byte for byte, slices included, as
long as no expert changes in value or precision. Otherwise all of it is decoded to the config's dtype, because one
config cannot describe two layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from moekit.checkpoint.export import quantization_config
from moekit.checkpoint.quantizer import METHOD, VERSION, describe_layer
from moekit.checkpoint.shards import Lazy
from moekit.errors import PlanError
from moekit.plan import pieces
from moekit.plan.document import Plan
from moekit.plan.finite import copied, finite
from moekit.plan.output_config import output_config
from moekit.plan.router_pieces import router_pieces
from moekit.plan.target import LayerTarget, Target, make_target

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

REST = "rest"
"""The unit of everything outside numbered layers: embeddings, final norm, head."""


class Fate(NamedTuple):
    """What became of one source tensor: a word, what of the output it went into, and why where it was dropped."""

    became: str
    into: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Unit:
    """One layer of the output, or the rest: written, journaled and compared as a whole."""

    name: str
    tensors: Mapping[str, Lazy]
    rebuilt_bytes: int

    @property
    def working_bytes(self) -> int:
        """The most memory that making its tensors takes at once, estimated on the high side."""
        return self.rebuilt_bytes + 2 * max((lazy.nbytes for lazy in self.tensors.values()), default=0)


@dataclass(frozen=True)
class Production:
    """Everything that applying ``plan`` to ``checkpoint`` writes, in order; ``expert_names``: the routed experts'.

    ``absent``: tensors whose values a method computed and whose file is not at hand, so that they cannot be made.
    """

    target: Target
    config: Mapping[str, Any]
    units: tuple[Unit, ...]
    fates: Mapping[str, Fate]
    expert_names: frozenset[str]
    absent: frozenset[str] = frozenset()

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        return {name: lazy for unit in self.units for name, lazy in unit.tensors.items()}


def produce(checkpoint: Checkpoint, plan: Plan, format: str = "auto", materialise: bool = False) -> Production:
    """Describe the output; reads headers only (and tables of expert ids, where routing uses them).

    Raises:
        PlanError: the plan is not sane for this checkpoint, or the format cannot express it.
    """
    plan.check(checkpoint)
    target = make_target(checkpoint, plan, format, materialise)
    return _Builder(checkpoint, target).build()


class _Builder:
    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        self.checkpoint, self.target = checkpoint, target
        self.units: dict[str, dict[str, Lazy]] = {}
        self.rebuilt: dict[str, int] = {}
        self.fates: dict[str, Fate] = {}
        self.packed: dict[str, dict[str, Any]] = {}
        self.experts: set[str] = set()
        self.absent: set[str] = set()
        layers = [layer for layer in target.layers.values() if layer.values is not None]
        self.edits = {name: layer.values for layer in layers if layer.values for name in layer.values.edits}

    def build(self) -> Production:
        self.units[REST] = {}
        for name in self.checkpoint.tensors:  # layers in the source's order, whatever is changed in them
            self.units.setdefault(unit_of(name), {})
        self._drop_extra()
        for layer in self.target.layers.values():
            self._layer(layer)
        self._copy_others()
        lost = self.checkpoint.tensors.keys() - self.fates.keys()
        assert not lost, f"{min(lost)} is not accounted for"
        units = (
            Unit(name, tensors, self.rebuilt.get(name, 0))
            for name, tensors in sorted(self.units.items(), key=lambda item: _order(item[0]))
            if tensors
        )
        config = output_config(self.checkpoint, self.target, self._quantization())
        return Production(
            self.target, config, tuple(units), self.fates, frozenset(self.experts), frozenset(self.absent)
        )

    def _drop_extra(self) -> None:
        for layer, why in self.target.dropped.items():
            unit = unit_of(f"{layer}.")
            for name in self.checkpoint.tensors:
                if unit_of(name) == unit:
                    self.fates[name] = Fate("dropped", (), why)

    def _layer(self, target: LayerTarget) -> None:
        checkpoint, layer = self.checkpoint, target.layer
        unit = unit_of(layer.expert_tensors[0].name)
        makers: Mapping[str, Callable[[Checkpoint, LayerTarget], dict[str, Lazy]]] = {
            "copy": pieces.copied_experts,
            "dense": pieces.dense_experts,
            "export": pieces.exported_experts,
        }
        if target.own:
            experts, bank = pieces.own_experts(checkpoint, target)
            rewrite = checkpoint.scheme.rewrite(layer.name) if target.rewrite is None else target.rewrite.describe
            self.packed[layer.name] = describe_layer(bank, target.slots, rewrite)
            added = pieces.rewrite_pieces(target)
            self.units[unit] |= added
            if target.rewrite is not None and target.rewrite.path is None:
                self.absent |= added.keys()
        else:
            experts = makers[target.style](checkpoint, target)
        if target.style != "copy":
            more = pieces.rebuilding_bytes(checkpoint, target, experts)
            self.rebuilt[unit] = self.rebuilt.get(unit, 0) + more  # two MoE modules of one layer are rebuilt together
        around = router_pieces(checkpoint, target)
        self.units[unit] |= experts | around
        self.experts |= experts.keys()
        if target.values is not None and target.values.path is None:
            self.absent |= {*experts, *target.values.edits}
        self._account(target, around)

    def _account(self, target: LayerTarget, around: Mapping[str, Lazy]) -> None:
        word = {"dense": "rebuilt", "packed": "quantised", "export": "quantised"}.get(target.style, "kept")
        word = "computed" if target.values is not None else word
        users: dict[int, list[int]] = {}
        for index, expert in enumerate(target.experts):
            for source, _ in expert.parts if expert else ():
                users.setdefault(source, []).append(index)
        for tensor in target.layer.expert_tensors:
            for name in tensor.stored.tensors.values():
                if tensor.expert is None:
                    self.fates[name] = Fate(word, (f"{target.layer.name}: stored experts",))
                elif tensor.expert in users:
                    into = tuple(f"{target.layer.name}: stored expert {i}" for i in users[tensor.expert])
                    self.fates[name] = Fate(word, into)
                else:
                    self.fates[name] = Fate("dropped", (), "the plan drops its expert")
        for name in around:
            kept = "replaced" if name in self.edits else "kept"
            self.fates[name] = Fate(kept if _same_rows(target) else "rows chosen", (name,))

    def _copy_others(self) -> None:
        for plain, stored in self.checkpoint.stored.items():
            names = list(stored.tensors.values())
            if all(name in self.fates for name in names):
                continue
            unit = self.units[unit_of(plain)]
            if names == [plain] or not self.target.dense:
                for name in names:
                    unit[name] = self._edited(name) or copied(self.checkpoint, name)
                    self.fates[name] = Fate("replaced" if name in self.edits else "kept", (name,))
            else:
                unit[plain] = self._decoded(plain)
                self.fates |= dict.fromkeys(names, Fate("decoded", (plain,)))

    def _edited(self, name: str) -> Lazy | None:
        """What the plan puts in place of a tensor around the experts, if it does."""
        if name not in self.edits:
            return None
        info, values = self.checkpoint.tensors[name], self.edits[name]
        return Lazy(info.dtype, info.shape, lambda: finite(values.edit(name), name))

    def _decoded(self, plain: str) -> Lazy:
        stored, dtype = self.checkpoint.stored[plain], self.checkpoint.scheme.dtype
        if stored.carrier == "weight":
            shape = self.checkpoint.tensors[stored.tensors["weight"]].shape
        elif "shape" in stored.tensors:
            shape = tuple(self.checkpoint.read(stored.tensors["shape"]).tolist())
        else:
            raise PlanError(
                f"{plain} is stored as {', '.join(sorted(stored.tensors))}, which cannot be decoded outside the layers "
                "the plan names; use a plan that leaves every expert as it is, or drops experts only"
            )
        return Lazy(dtype, shape, lambda: finite(self.checkpoint.read_plain(plain, dtype), plain))

    def _quantization(self) -> dict[str, Any] | None:
        if self.packed:
            return {"quant_method": METHOD, "version": VERSION, "layers": self.packed}
        if self.target.format != "compressed-tensors":
            return None
        first = next(iter(self.target.layers.values())).experts[0]
        assert first is not None
        return quantization_config(first.bits, first.group_size, self._linears())

    def _linears(self) -> set[str]:
        """Every linear module left as it was, by its name in memory and by its name on disk: readers use both."""
        layers = tuple(f"{name}.experts" for name in self.target.layers)
        model = self.checkpoint.structure.model
        names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(layers)}
        matrices = (n for unit in self.units.values() for n, lazy in unit.items() if len(lazy.shape) == 2)
        return names | {n.removesuffix(".weight") for n in matrices if n.endswith(".weight")}


def unit_of(name: str) -> str:
    """The unit a tensor belongs to: its name up to the first number, or the rest."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else REST


def _order(unit: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    """The rest first (so that a resumed run reads it no more), then layers by number."""
    parts = [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in unit.split(".")]
    return unit != REST, parts


def _same_rows(target: LayerTarget) -> bool:
    return target.rows == tuple(((e, 1.0),) for e in range(target.layer.num_experts))
