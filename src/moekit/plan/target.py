"""What a plan becomes in one output format: for every MoE layer the rows, experts and slots that will lie on disk.

Formats: ``stock`` (what the family's own classes load: one number of experts for all layers, row s calls expert s,
the source's precision), ``moekit`` (anything a plan can say), ``compressed-tensors`` (stock with all experts at 4 or at
8 bits). ``auto`` is stock where it can be, else moekit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from moekit.checkpoint.export import BITS as EXPORT_BITS
from moekit.errors import OptionError, PlanError
from moekit.plan.document import Plan
from moekit.plan.layer import LayerPlan, Row, StoredExpert
from moekit.plan.values import Values

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer

FORMATS = ("auto", "stock", "moekit", "compressed-tensors")


@dataclass(frozen=True)
class LayerTarget:
    """One layer of the output. ``experts[i]`` None is an expert of zeros, ``rows[s]`` None a row of zeros: padding.

    ``slots[s]`` is the stored expert of row s, -1 where the row must never be chosen. ``style``: "copy" (as the source
    stores it), "dense" (the family's layout, rebuilt), "packed" (moekit's), "select" (as a source stores
    it that is itself in moekit's format) or "export" (compressed-tensors).
    ``values``: the numbers of all experts, where a method computed them; expert i of the output is ``values_of[i]``.
    """

    layer: MoELayer
    style: str
    experts: tuple[StoredExpert | None, ...]
    rows: tuple[Row | None, ...]
    slots: tuple[int, ...]
    values: Values | None = None
    values_of: tuple[int | None, ...] = ()
    rewrite: Values | None = None

    @property
    def own(self) -> bool:
        """Whether the experts lie in moekit's own format."""
        return self.style in ("packed", "select")

    @property
    def plain(self) -> bool:
        return self.slots == tuple(range(len(self.experts)))

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """A tensor of the source, or what the plan replaces it by."""
        return self.values.edit(name) if self.values and name in self.values.edits else checkpoint.read(name)


@dataclass(frozen=True)
class Target:
    """``dense``: what the source stores quantised is decoded. ``dropped``: extra layers left out, and why."""

    format: str
    layers: Mapping[str, LayerTarget]
    dense: bool
    dropped: Mapping[str, str]

    @property
    def num_rows(self) -> int:
        """Router rows per layer of the output: the number of experts its config states."""
        return len(next(iter(self.layers.values())).rows)


def make_target(checkpoint: Checkpoint, plan: Plan, format: str = "auto", materialise: bool = False) -> Target:
    """Decide how ``plan`` is laid out on disk.

    Args:
        materialise: let the stock formats store shared experts once per row that calls them, and pad layers with
            fewer experts than others by rows that a selection bias of -inf forbids.

    Raises:
        PlanError: the format cannot express the plan; says what it is that it cannot.
        OptionError: an unknown format.
    """
    if format not in FORMATS:
        raise OptionError(f"unknown format '{format}': use one of {', '.join(FORMATS)}")
    quantised, own = bool(checkpoint.scheme.config), checkpoint.scheme.own
    shared = next((layer.name for layer in _live(checkpoint) if checkpoint.scheme.shares(layer.name)), None)
    if shared is not None:
        raise PlanError(
            f"layer {shared} of {checkpoint.path} has router rows that share an expert or are masked: apply plans to "
            "the model it was made from"
        )
    plans = {
        layer.name: plan.layer(layer.name, layer.num_experts) for layer in checkpoint.moe_layers if not layer.extra
    }
    fixed = checkpoint.fixed_count
    if all(len(plans[layer.name].rows) == layer.num_experts for layer in _live(checkpoint)):
        fixed = None
    if format == "auto":
        format = "moekit" if own or fixed else _choose(plans)
    dense = quantised and (format == "compressed-tensors" or not all(map(_as_it_was, plans.values())))
    layers: dict[str, LayerTarget] = {}
    if format == "moekit":
        wide = fixed is not None or len({len(layer.rows) for layer in plans.values()}) > 1
        for layer in _live(checkpoint):
            described = checkpoint.scheme.described(layer.name)
            layers[layer.name] = _packed(layer, plans[layer.name], wide, dense, described is not None)
        dense = not any(layer.own for layer in layers.values()) if own else dense
    else:
        if fixed is not None:
            raise PlanError(f"the number of router rows cannot change ({fixed}); use --format moekit, which keeps all")
        _check_bits(plans, format)
        if not materialise:
            _check_stock(plans)
        dense = dense or own
        count = max(len(layer.rows) for layer in plans.values())
        for layer in _live(checkpoint):
            layers[layer.name] = _stock(layer, plans[layer.name], count, dense, format)
    return Target(format, layers, dense, _dropped(checkpoint, plan, layers))


def _as_it_was(plan: LayerPlan) -> bool:
    """Whether experts are only kept or dropped, their values and precision untouched."""
    return plan.values is None and plan.rewrite is None and all(expert.untouched for expert in plan.experts)


def _in_family_layout(plan: LayerPlan) -> bool:
    """Whether the family's own layout can hold the layer."""
    return (
        plan.plain_slots
        and plan.rewrite is None
        and all(expert.bits == 16 for expert in plan.experts)
        and (plan.values is None or plan.values.dense)
    )


def _live(checkpoint: Checkpoint) -> Iterator[MoELayer]:
    return (layer for layer in checkpoint.moe_layers if not layer.extra)


def _choose(plans: Mapping[str, LayerPlan]) -> str:
    plain = all(map(_in_family_layout, plans.values()))
    return "stock" if plain and len({len(p.rows) for p in plans.values()}) == 1 else "moekit"


def _check_bits(plans: Mapping[str, LayerPlan], format: str) -> None:
    bits = {(e.bits, e.group_size if e.bits != 16 else 0) for layer in plans.values() for e in layer.experts}
    shown = ", ".join(f"{b} bits" if b == 16 else f"{b} bits in groups of {g}" for b, g in sorted(bits))
    if format == "stock" and any(b != 16 for b, _ in bits):
        raise PlanError(
            f"the stock format keeps the source's precision, but the plan has experts at {shown}; "
            "use --format moekit, or compressed-tensors for 4 or 8 bits throughout"
        )
    if format == "compressed-tensors" and (len(bits) > 1 or next(iter(bits))[0] not in EXPORT_BITS):
        raise PlanError(
            f"the compressed-tensors format needs every expert at 4 or every expert at 8 bits, and one "
            f"group size, but the plan has {shown}; its readers decode mixed widths wrongly: "
            "use --format moekit"
        )


def _check_stock(plans: Mapping[str, LayerPlan]) -> None:
    counts = {len(layer.rows) for layer in plans.values()}
    if len(counts) > 1:
        raise PlanError(
            f"layers keep between {min(counts)} and {max(counts)} experts, but the stock format has one "
            "number for all; use --format moekit, or materialise to pad the smaller layers"
        )
    for name, layer in plans.items():
        if not layer.plain_slots:
            raise PlanError(
                f"layer {name} has router rows that share an expert or are masked, which the stock format "
                "cannot say; use --format moekit, or materialise to store shared experts several times"
            )
        if layer.rewrite is not None:
            raise PlanError(
                f"layer {name} changes its routing at run time ({layer.rewrite.describe['kind']}), which the stock "
                "format cannot say; use --format moekit"
            )
        if layer.values is not None and not layer.values.dense:
            raise PlanError(
                f"layer {name} stores its experts as {layer.values.format}, which the stock format cannot say; use "
                "--format moekit, or materialise to write them out as plain weights"
            )


def _stock(layer: MoELayer, plan: LayerPlan, count: int, dense: bool, format: str) -> LayerTarget:
    padding = count - len(plan.rows)
    experts = tuple(plan.experts[slot] if slot >= 0 else None for slot in plan.slots) + (None,) * padding
    rows = plan.rows + (None,) * padding
    if None in experts:
        _check_maskable(layer)
    style = "export" if format == "compressed-tensors" else "copy"
    if style == "copy" and (dense or None in experts or not _as_it_was(plan)):
        style = "dense"
    slots = tuple(i if e else -1 for i, e in enumerate(experts))
    return LayerTarget(layer, style, experts, rows, slots, plan.values, plan.slots)


def _check_maskable(layer: MoELayer) -> None:
    """A stock router obeys a mask only through a bias on what it ranks."""
    if layer.groups:
        raise PlanError(
            f"layer {layer.name} ranks experts in groups, where padded rows change the ranking; use --format moekit"
        )
    if not any(is_bias(row.name) for row in layer.row_tensors):
        raise PlanError(
            f"layer {layer.name} has no selection bias, so a stock router could choose its padded rows; "
            "use --format moekit"
        )


def is_bias(name: str) -> bool:
    """Whether a row tensor is added to what the router ranks (router weights and output scales are not)."""
    return "bias" in name.rpartition(".")[2]


def _packed(layer: MoELayer, plan: LayerPlan, wide: bool, dense: bool, own: bool) -> LayerTarget:
    """``own``: the source holds this layer in moekit's format already."""
    if wide:
        plan = _widened(plan, layer)
    moved = (s >= 0 and row != ((at, 1.0),) for at, (row, s) in enumerate(zip(plan.rows, plan.slots, strict=True)))
    if not layer.row_tensors and any(moved):
        raise PlanError(
            f"the router of {layer.name} has no row per expert on disk that could be blended or moved: keep the rows "
            "of the experts that stay"
        )
    if own and _as_it_was(plan):
        style = "select"
    elif not _in_family_layout(plan):
        style = "packed"
    else:
        style = "copy" if not dense and _as_it_was(plan) else "dense"
    of = tuple(range(len(plan.experts)))
    return LayerTarget(layer, style, plan.experts, plan.rows, plan.slots, plan.values, of, plan.rewrite)


def _widened(plan: LayerPlan, layer: MoELayer) -> LayerPlan:
    """The same layer with as many router rows as the source has, each kept row at the place of its heaviest source row
    (or one near it, in its group); the others are masked. Layers with different counts then share one config."""
    place = {at: index for index, at in enumerate(places(plan.rows, layer.num_experts, layer.groups))}
    at = [place.get(position) for position in range(layer.num_experts)]
    return LayerPlan(
        num_experts=plan.num_experts,
        experts=plan.experts,
        slots=tuple(-1 if i is None else plan.slots[i] for i in at),
        rows=tuple(((position, 1.0),) if i is None else plan.rows[i] for position, i in enumerate(at)),
        why=plan.why,
        values=plan.values,
        rewrite=plan.rewrite,
    )


def places(rows: Sequence[Row], num_experts: int, groups: tuple[int, int] | None) -> list[int]:
    """Where each row stands among ``num_experts``: at its heaviest source row, or at one near that, in its group."""
    size = num_experts // (groups[0] if groups else 1)
    free, found = set(range(num_experts)), []
    for row in rows:
        wish = max(row, key=lambda part: part[1])[0]
        found.append(min(free, key=lambda p: (p // size != wish // size, abs(p - wish), p)))
        free.discard(found[-1])
    return found


def _dropped(checkpoint: Checkpoint, plan: Plan, layers: Mapping[str, LayerTarget]) -> dict[str, str]:
    extra = [layer.name for layer in checkpoint.moe_layers if layer.extra]
    changed = any(len(target.rows) != target.layer.num_experts for target in layers.values())
    if plan.extra == "drop":
        reason = "the plan drops prediction layers"
    elif changed:
        reason = "a prediction layer has as many experts as the config says, and the plan changes that number"
    else:
        return {}
    return dict.fromkeys(extra, reason)
