"""The report of a profile: one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from moekit.errors import OutputError
from moekit.profile import _charts as charts
from moekit.profile._file import write_whole
from moekit.profile.document import LEAST_TOKENS, Profile
from moekit.profile.layer import LayerProfile
from moekit.profile.schema import PHASES
from moekit.profile.tables import RELIABILITY, load, tables

_PANELS = 12
"""Co-activation matrices shown; the layers between are left out evenly."""


def write(profile: Profile, path: str | PathLike[str], overwrite: bool) -> None:
    """Raises OutputError if ``path`` exists (without ``overwrite``) or cannot be written."""
    target = Path(path)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already: name another file, or pass --overwrite")
    write_whole(target, [page(profile).encode()])


def page(profile: Profile) -> str:
    """The page as text. Deterministic: no dates, no paths."""
    layers = list(profile.layers.values())
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = _shown
    template = environment.from_string(files("moekit.profile").joinpath("templates/report.html.j2").read_text("utf-8"))
    return template.render(
        profile=profile,
        numbers=_numbers(profile, layers),
        domains=list(zip(profile.domains, _cycle(len(profile.domains)), strict=True)),
        who=_who(profile, layers) if len(profile.domains) > 1 else None,
        load=[("all text", _load(layers, None)), *((d, _load(layers, [d])) for d in profile.domains)],
        norms=_relative(layers, "output_norm", charts.COOL, "output norm", per_token=True),
        work=_relative(layers, "contribution", charts.HOT, "contribution", per_token=False),
        coverage=_coverage(layers),
        together=_together(layers),
        trust=_trust(layers),
        tables=tables(profile, LEAST_TOKENS),
        hot=Markup(charts.scale(charts.HOT)),
        cool=Markup(charts.scale(charts.COOL)),
        two_sided=Markup(charts.scale(charts.TWO_SIDED)),
    )


def _numbers(profile: Profile, layers: Sequence[LayerProfile]) -> list[tuple[str, str]]:
    starved = sum(map(len, profile.starved().values()))
    experts = sum(layer.num_experts for layer in layers)
    trust = [layer.reliability("counts") for layer in layers]
    known = [value for value in trust if not np.isnan(value)]
    decoded = int(layers[0].total("tokens", phase=PHASES[1])) if layers else 0
    found = [
        (f"{len(layers)}", "MoE layers"),
        (f"{experts:,}", "experts"),
        (f"{profile.num_tokens:,}", "tokens observed"),
        (f"{starved:,}", f"starved (< {LEAST_TOKENS} tokens)"),
        (f"{np.median(known):.2f}" if known else "-", "median reliability"),
    ]
    return [*found[:3], (f"{decoded:,}", "of them decoded"), *found[3:]] if decoded else found


def _stack(layers: Sequence[LayerProfile], figures: Sequence[np.ndarray]) -> np.ndarray:
    """[layers, most experts], nan beyond a layer's own."""
    wide = np.full((len(layers), max(layer.num_experts for layer in layers)), np.nan)
    for row, figure in zip(wide, figures, strict=True):
        row[: len(figure)] = figure
    return wide


def _titles(layers: Sequence[LayerProfile], texts: np.ndarray) -> list[list[str]]:
    return [
        [f"{layer.name}, expert {e}: {texts[i][e]}" for e in range(layer.num_experts)] for i, layer in enumerate(layers)
    ]


def _rows(layers: Sequence[LayerProfile]) -> list[str]:
    return [str(layer.layer) for layer in layers]


def _load(layers: Sequence[LayerProfile], domains: list[str] | None) -> Markup:
    values = _stack(layers, [load(layer, domains) for layer in layers])
    texts = np.array([[f"{value:.2f} x even" for value in row] for row in values], dtype=object)
    pixels = charts.colours(np.sqrt(values / 4), charts.HOT)
    return Markup(charts.heat_map(pixels, rows=_rows(layers), titles=_titles(layers, texts), columns="expert"))


def _who(profile: Profile, layers: Sequence[LayerProfile]) -> Markup:
    """Each expert in the colour of the domain that leans on it most; the stronger, the more it is that domain's own."""
    shares = [np.stack([load(layer, [d]) for d in profile.domains]) for layer in layers]
    share = [s / np.maximum(s.sum(axis=0), 1e-12) for s in shares]
    # A domain's share of an expert against an even share; three times and a half is as bright as it gets.
    most = min(len(profile.domains) - 1, 2.5)
    which = _stack(layers, [s.argmax(axis=0) for s in share])
    own = _stack(layers, [(s.max(axis=0) * len(profile.domains) - 1) / most for s in share])
    busy = _stack(layers, [s.mean(axis=0) for s in shares])
    strength = np.nan_to_num(np.clip(own, 0, 1) * np.clip(busy * 3, 0, 1))
    texts = np.array(
        [
            [", ".join(f"{d} {s[k, e]:.0%}" for k, d in enumerate(profile.domains)) for e in range(s.shape[1])]
            for s in share
        ],
        dtype=object,
    )
    pixels = charts.blend(strength, np.nan_to_num(which).astype(int))
    return Markup(charts.heat_map(pixels, rows=_rows(layers), titles=_titles(layers, texts), columns="expert"))


def _relative(
    layers: Sequence[LayerProfile], name: str, stops: Sequence[tuple[float, str]], what: str, *, per_token: bool
) -> Markup | None:
    """A figure of each expert over its layer's mean."""
    if any(name not in layer.arrays for layer in layers):
        return None
    figures = [layer.per_token(name) if per_token else layer.total(name) for layer in layers]
    values = _stack(layers, [f / max(float(np.nanmean(f)) if np.isfinite(f).any() else 0.0, 1e-30) for f in figures])
    texts = np.array([[f"{what} {value:.2f} x the layer's mean" for value in row] for row in values], dtype=object)
    pixels = charts.colours(np.sqrt(values / 4), stops)
    return Markup(charts.heat_map(pixels, rows=_rows(layers), titles=_titles(layers, texts), columns="expert"))


def _coverage(layers: Sequence[LayerProfile]) -> Markup:
    """How much of each layer's work its busiest experts carry."""
    name = "gate_norm" if all("gate_norm" in layer.arrays for layer in layers) else "counts"
    lines = []
    for layer in layers:
        total = np.sort(layer.total(name))[::-1].cumsum()
        lines.append(np.concatenate([[0.0], total / max(total[-1], 1e-30)]))
    return Markup(charts.curves(lines, [layer.name for layer in layers]))


def _together(layers: Sequence[LayerProfile]) -> list[tuple[str, Markup]]:
    """Per layer: how much more often two experts are chosen together than if choices were independent, in log2."""
    usable = [layer for layer in layers if "coactivation" in layer.arrays and layer.top_k > 1]
    kept = np.unique(np.linspace(0, max(len(usable) - 1, 0), min(len(usable), _PANELS)).round().astype(int))
    panels = []
    for layer in (usable[i] for i in kept):
        joint, tokens = layer.array("coactivation"), max(float(layer.total("tokens")), 1.0)
        alone = np.diag(joint)
        # Two slots of one token differ, so even independent choices meet a little less often than the product says.
        expected = np.outer(alone, alone) / tokens * (layer.top_k - 1) / layer.top_k
        with np.errstate(divide="ignore", invalid="ignore"):
            lift = np.log2(np.where(expected >= 1, np.maximum(joint, 0.5) / expected, np.nan))
        np.fill_diagonal(lift, np.nan)
        panels.append(
            (layer.name, Markup(charts.heat_map(charts.colours(lift / 6 + 0.5, charts.TWO_SIDED), width=220)))
        )
    return panels


def _trust(layers: Sequence[LayerProfile]) -> list[tuple[str, list[tuple[str, float | None]]]]:
    names = [name for name in RELIABILITY if all(name in layer.arrays for layer in layers)]
    return [(layer.name, [(n, _known(layer.reliability(n))) for n in names]) for layer in layers]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _cycle(count: int) -> list[str]:
    return [charts.DOMAINS[i % len(charts.DOMAINS)] for i in range(count)]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
