"""A fit in words: what it would do to the model, with which levers, and why."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from moekit.formats import LowRankBank
from moekit.plan.layer import LayerPlan
from moekit.stream import gigabytes

if TYPE_CHECKING:
    from moekit.plan.fit import FitResult

LISTED = 6


def explain(fit: FitResult) -> str:
    """Several lines: the budget, the levers, the loss, and the plans that came next."""
    lines = [
        f"Budget: {fit.budget.asked}: {gigabytes(fit.budget.nbytes)} of weights; the source has "
        f"{gigabytes(fit.source_nbytes)}, the result {gigabytes(fit.nbytes)} ({fit.nbytes / fit.source_nbytes:.1%}).",
        *levers(fit),
        *measuring(fit),
        f"Loss: {_loss(fit.predicted, fit.measured)}.",
    ]
    if fit.measured is not None and fit.spread is not None:
        low, high = fit.spread
        lines.append(f"Predictions: the other measured plans lost {low:.2g} to {high:.2g} times what was predicted.")
    others = fit.candidates[1 : LISTED + 1]
    if others:
        lines.append("Next best at no more bytes:")
        lines += [f"  {one.name}: {_loss(one.predicted, one.measured)}" for one in others]
    return "\n".join(lines)


def measuring(fit: FitResult) -> list[str]:
    """How many of the plans were measured, where it was not all of them, and why."""
    measured = sum(one.measured is not None for one in fit.candidates)
    if measured in (0, len(fit.candidates)):
        return []
    why = ": the model does not fit in memory, and each measurement reads all of it from disk" if fit.reads_disk else ""
    return [f"Measured: {measured} of {len(fit.candidates)} plans, those of least predicted loss{why}."]


def levers(fit: FitResult) -> tuple[str, ...]:
    """One line per lever: how far it was used, and why."""
    layers = fit.plan.layers.values()
    total = sum(layer.num_experts for layer in layers)
    stored = [expert for layer in layers for expert in layer.experts]
    counts = [len(layer.experts) for layer in layers]
    merged = sum(len(expert.parts) > 1 for expert in stored)
    ranks = Counter(rank for layer in layers for rank in ranks_in(layer))
    widths = Counter((bits, group if bits != 16 else 0) for layer in layers for bits, group in layer.widths)
    widths[16, 0] -= ranks.total()
    lines = [f"Chosen: {fit.candidates[0].name}, of {len(fit.candidates)} plans that fit."]
    if len(stored) < total and not merged:
        lines.append(
            f"Experts: {len(stored)} of {total} kept, {_range(counts)} per layer; the others add least to the output "
            "per byte they take."
        )
    elif merged:
        lines.append(f"Experts: {total} stored as {len(stored)}, {merged} of them merged from several.")
    else:
        lines.append("Experts: all kept; rounding loses less per byte than dropping.")
    parts = ", ".join(
        f"{n} at {bits} bits" + (f" in groups of {group}" if bits != 16 else "")
        for (bits, group), n in sorted(widths.items(), key=lambda item: (-item[0][0], item[0][1]))
        if n > 0
    )
    several = sum(n > 0 for n in widths.values()) > 1
    where = "; more bits where the weighted output error per byte is largest" if several else " throughout"
    lines += [f"Precision: {parts}{'' if ranks and not several else where}."] if parts else []
    if ranks:
        lines.append(f"Low rank: {_counted(ranks)}; their factors lose less per byte than bits would.")
    elif fit.low_rank:
        lines.append("Low rank: weighed, and used nowhere; factors of as many bytes would lose more.")
    return tuple(lines)


def ranks_in(layer: LayerPlan) -> list[int]:
    """The rank of every stored expert that is kept as factors."""
    if layer.values is None or layer.values.format != LowRankBank.FORMAT:
        return []
    each = layer.values.describe["down_rank"]
    chosen = range(len(each)) if layer.values.chosen is None else layer.values.chosen
    return [each[e] for e in chosen if each[e] is not None]


def _counted(ranks: Counter[int]) -> str:
    return ", ".join(f"{n} at rank {rank}" for rank, n in sorted(ranks.items(), reverse=True))


def _range(counts: list[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least}" if least == most else f"{least} to {most}"


def _loss(predicted: float, measured: float | None) -> str:
    if predicted != predicted:  # another method's plan: only measured
        return f"measured {measured:.2g} nats per token" if measured is not None else "not predicted"
    unit = "nats per token" if measured is not None else "nats per token (nothing was run to calibrate it)"
    said = f"predicted {predicted:.2g} {unit}"
    return said if measured is None else f"{said}, measured {measured:.2g} on calibration tokens"
