"""Any method on a layer without the experts that must stay as they are: it never sees them, so it cannot touch them.

The method plans for the others as if the layer had only these; then the protected ones are put back, untouched, each
with its router row. What is kept in all stays what the method's ``keep`` says, the protected ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from moekit.compress._select import count_to_keep
from moekit.errors import PlanError
from moekit.formats import DenseBank, PackedBank
from moekit.plan import values
from moekit.plan.document import LayerPlan, Plan, StoredExpert
from moekit.plan.planner import Evaluate, Method, PlannedSource, Site, Source, sites_of

if TYPE_CHECKING:
    from moekit.bank import ExpertBank
    from moekit.profile import Profile


@dataclass(frozen=True)
class _Rest(PlannedSource):
    """The layers that ``done`` names, each without the experts it leaves out."""

    @property
    def moe_layers(self) -> Sequence[Site]:
        left = [site for site in sites_of(self.source) if site.name in self.done.layers]
        each = ((site, self._site(site)) for site in left)
        # Of a token's experts some may be protected ones: it needs only so many others.
        return [replace(rest, top_k=max(1, s.top_k - s.num_experts + rest.num_experts)) for s, rest in each]


def around(
    planner: Method,
    protected: Mapping[str, Collection[int]],
    profile: Profile | None,
    source: Source,
    evaluate: Evaluate | None = None,
) -> dict[str, LayerPlan]:
    """What ``planner`` makes of every layer, with the ``protected`` experts of each left exactly as they are.

    Layers with as many protected experts are planned together, each number apart.

    Raises:
        PlanError: ``keep`` leaves no place beside the protected ones, or the method changes what cannot be changed for
            some experts alone (the routing at run time, tensors around the experts, formats of its own).
    """
    sites = [site for site in sites_of(source) if not site.extra]
    alike: dict[tuple[int, int | None], dict[str, LayerPlan]] = {}
    for site in sites:
        mine = protected.get(site.name, ())
        keep = getattr(planner, "keep", None)
        count = None if keep is None else count_to_keep(keep, site)
        least = len(mine) + (2 * site.num_groups if site.num_groups > 1 else 1)  # groups rank by their best two
        if site.num_experts < least or (count is not None and count < least):
            raise PlanError(
                f"layer {site.name}: {len(mine)} of {site.num_experts} experts are protected, which leaves "
                f"{planner.spec} too few to choose from; keep {least} or more"
            )
        rest = [e for e in range(site.num_experts) if e not in mine]
        alike.setdefault((len(mine), count), {})[site.name] = LayerPlan.keep(rest, site.num_experts)
    made: dict[str, LayerPlan] = {}
    for (number, count), hidden in alike.items():
        fewer = planner if count is None or not number else replace(cast(Any, planner), keep=count - number)
        made |= _planned(fewer, hidden, profile, source, evaluate)
    return {site.name: made[site.name] for site in sites}


def _planned(
    planner: Method,
    hidden: Mapping[str, LayerPlan],
    profile: Profile | None,
    source: Source,
    evaluate: Evaluate | None,
) -> dict[str, LayerPlan]:
    """Layers that ``hidden`` names, planned without what it drops of them."""
    rest = Plan(source=source.fingerprint, layers=hidden)

    def whole(plan: Plan) -> dict[str, LayerPlan]:
        return {name: restored(hidden[name], made, partial(source.bank, name)) for name, made in plan.layers.items()}

    seen = profile and profile.recombined(rest)
    seen = seen and replace(seen, layers={name: layer for name, layer in seen.layers.items() if name in hidden})
    measure = None if evaluate is None else lambda plan: evaluate(replace(plan, layers=whole(plan)))
    return whole(planner.plan(seen, _Rest(source, rest), measure))


def even(protected: Collection[int], spare_E: Sequence[float], site: Site) -> tuple[int, ...]:
    """As many protected experts in every routing group: where a group has fewer, those of most ``spare_E`` join."""
    size = site.num_experts // site.num_groups
    groups = [range(first, first + size) for first in range(0, site.num_experts, size)]
    most = max(sum(e in protected for e in group) for group in groups)
    ranked = (sorted(group, key=lambda e: (e not in protected, -spare_E[e], e)) for group in groups)
    return tuple(sorted(e for group in ranked for e in group[:most]))


def restored(hidden: LayerPlan, inner: LayerPlan, bank: Callable[[], DenseBank]) -> LayerPlan:
    """``inner``, made for the experts that ``hidden`` leaves, with the hidden ones put back in their places."""
    if inner.rewrite is not None or (inner.values is not None and inner.values.edits):
        raise PlanError("a method that changes more of a layer than its experts cannot leave some of them out")
    back = hidden.dropped
    if not back:
        return inner
    plan = hidden.then(inner)
    experts = [*plan.experts, *(StoredExpert(((e, 1.0),)) for e in back)]
    slots = [*plan.slots, *range(len(plan.experts), len(experts))]
    rows = [*plan.rows, *(((e, 1.0),) for e in back)]
    order = sorted(range(len(rows)), key=lambda i: max(rows[i], key=lambda part: part[1])[0])
    stored = [slots[i] for i in order] if plan.plain_slots else list(range(len(experts)))
    computed = plan.values
    if computed is not None:
        source = bank()
        joined = _joined(computed.bank(activation=source.activation), source.select(back))
        computed = values.keep(joined.select(stored))
    return replace(
        plan,
        experts=tuple(experts[m] for m in stored),
        slots=tuple(stored.index(slots[i]) if slots[i] >= 0 else -1 for i in order),
        rows=tuple(rows[i] for i in order),
        values=computed,
        why=f"{plan.why}; protects {', '.join(map(str, back))}",
    )


def _joined(made: ExpertBank, back: DenseBank) -> Any:
    """Both banks as one; the second's experts come last, in their own precision."""
    if isinstance(made, DenseBank):
        mine, theirs = made.tensors(), back.tensors()
        return replace(made, **{name: torch.cat([mine[name], theirs[name].to(mine[name].dtype)]) for name in mine})
    if isinstance(made, PackedBank):
        plain, count = PackedBank.quantise(back, 16), made.num_experts
        renamed = ((f"{int(number) + count}.{leaf}", t) for (number, _, leaf), t in _named(plain.stored))
        sizes = made.group_size + plain.group_size
        return replace(made, stored={**made.stored, **dict(renamed)}, bits=made.bits + plain.bits, group_size=sizes)
    raise PlanError(
        f"experts stored as {type(made).__name__} cannot lie beside protected ones: protect them from methods that "
        "prune, merge, or quantise to packed integers"
    )


def _named(stored: Mapping[str, torch.Tensor]) -> Iterable[tuple[tuple[str, str, str], torch.Tensor]]:
    return ((name.partition("."), tensor) for name, tensor in stored.items())
