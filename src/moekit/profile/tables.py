"""The figures people ask a profile for, as plain tables: a terminal or a page may draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.profile.layer import LayerProfile

if TYPE_CHECKING:
    from moekit.profile.document import Profile

RELIABILITY = ("counts", "gate_norm", "contribution")
"""Statistics whose split-half reliability is shown: what planners most often rank by."""


@dataclass(frozen=True)
class Table:
    """``rows`` hold strings, numbers or None; ``note`` says in one line how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    note: str = ""


def load(layer: LayerProfile, domains: Sequence[str] | None = None) -> np.ndarray:
    """[E] tokens per expert relative to an even spread: 1 is the mean of the layer."""
    counts = layer.total("counts", domains)
    return counts / max(counts.mean(), 1e-12)


def effective_experts(layer: LayerProfile) -> float:
    """exp of the entropy of the experts' shares of (token, slot) pairs: E if all are used alike."""
    counts = layer.total("counts")
    share = counts[counts > 0] / max(counts.sum(), 1.0)
    return float(np.exp(-(share * np.log(share)).sum()))


def carrying(layer: LayerProfile, statistic: str, part: float) -> int:
    """How many experts, the largest first, it takes to carry ``part`` of the layer's total."""
    total = np.sort(layer.total(statistic))[::-1].cumsum()
    return int(np.searchsorted(total, part * total[-1]) + 1) if total[-1] > 0 else 0


def specialists(layer: LayerProfile, domain: str, most: int = 3) -> list[tuple[int, float]]:
    """(expert, lift) of the experts a domain uses most compared with how all domains together use them."""
    own, everyone = load(layer, [domain]), np.mean([load(layer, [d]) for d in layer.domains], axis=0)
    lift = np.divide(own, everyone, out=np.zeros_like(own), where=everyone > 0)
    best = np.argsort(-lift, kind="stable")[:most]
    return [(int(e), float(lift[e])) for e in best if lift[e] > 1]


def tables(profile: Profile, least: int) -> list[Table]:
    found = [_text(profile), _layers(profile, least)]
    if len(profile.domains) > 1:
        found.append(_specialists(profile))
    if starved := profile.starved(least):
        rows = tuple((name, len(experts), _listed(experts)) for name, experts in starved.items())
        note = f"chosen for fewer than {least} tokens: their figures mean little; give more text"
        found.append(Table("Starved experts", ("layer", "number", "experts"), rows, note))
    if profile.quota.balanced and "sample_expert" in profile.statistics:
        found.append(_sample(profile))
    return found


def _sample(profile: Profile) -> Table:
    short, quota = profile.undersampled(), profile.quota
    rows = tuple(
        (
            layer.name,
            len(layer.array("sample_expert")),
            quota.each(layer.num_experts, layer.top_k),
            int(layer.sampled().min()),
            _listed(short.get(layer.name, ())) or "-",
        )
        for layer in profile.layers.values()
    )
    note = f"every expert was to have {quota.balanced:g} times its even share; short: fewer, the text has no more"
    return Table("Sample", ("layer", "tokens", "wanted each", "fewest", "short"), rows, note)


def _text(profile: Profile) -> Table:
    first = next(iter(profile.layers.values()))
    rows = tuple(
        (
            domain,
            int(first.total("tokens", [domain], phase="prefill")),
            int(first.total("tokens", [domain], phase="decode")),
            sum(len(ids) for ids in profile.held_out.get(domain, ())),
        )
        for domain in profile.domains
    )
    return Table("Text", ("domain", "prefill tokens", "decode tokens", "held out"), rows)


def _layers(profile: Profile, least: int) -> Table:
    rows = []
    for layer in profile.layers.values():
        tokens = max(float(layer.total("tokens")), 1.0)
        doubt = float(layer.total("entropy")) / tokens if "entropy" in layer.arrays else None
        ranked = next((name for name in ("gate_norm", "counts") if name in layer.arrays), "counts")
        trust = layer.reliability(ranked)
        rows.append(
            (
                layer.name,
                layer.num_experts,
                layer.top_k,
                round(float(load(layer).max()), 2),
                round(effective_experts(layer), 1),
                None if doubt is None else round(doubt, 2),
                carrying(layer, ranked, 0.9),
                len(layer.starved(least)),
                None if np.isnan(trust) else round(trust, 2),
            )
        )
    columns = ("layer", "experts", "top-k", "peak load", "effective", "entropy", "carry 90%", "starved", "reliability")
    note = (
        "peak load: busiest expert over the mean; entropy of the router in nats; carry 90%: experts that do 9 tenths "
        "of gate x output norm; reliability: agreement of two halves of the text on the ranking, 1 is perfect"
    )
    return Table("Layers", columns, tuple(rows), note)


def _specialists(profile: Profile) -> Table:
    rows, most = [], 3 if len(profile.domains) <= 4 else 1
    for layer in profile.layers.values():
        best = [specialists(layer, domain, most) for domain in profile.domains]
        cells = [", ".join(f"{e} (x{lift:.1f})" for e, lift in found) or "-" for found in best]
        rows.append((layer.name, *cells))
    note = "experts each domain leans on most; x: its load there over its mean load in all domains"
    return Table("Specialists", ("layer", *profile.domains), tuple(rows), note)


def _listed(experts: Sequence[int], most: int = 12) -> str:
    shown = ", ".join(map(str, experts[:most]))
    return shown if len(experts) <= most else f"{shown} and {len(experts) - most} more"
