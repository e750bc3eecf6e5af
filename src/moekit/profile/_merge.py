"""Two profiles of one model as one: sums add, maxima stay, samples keep what a single run would have kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moekit.errors import ProfileError
from moekit.profile.layer import LayerProfile
from moekit.profile.schema import FIELDS

if TYPE_CHECKING:
    from moekit.profile.document import Profile, Tokens


def merge(one: Profile, two: Profile) -> Profile:
    two.check_source(one.source)
    if list(one.layers) != list(two.layers):
        raise ProfileError("the profiles cover different layers: profile the same checkpoint for both")
    domains = (*one.domains, *(domain for domain in two.domains if domain not in one.domains))
    sample, sampled = _pick_sample(one, two, domains)
    trace, traced = _pick_trace(one, two, domains)
    rows = {"s": sampled, "t": traced}
    layers = {n: _layer(layer, two.layers[n], domains, rows) for n, layer in one.layers.items()}
    held = {d: [*one.held_out.get(d, ()), *two.held_out.get(d, ())] for d in domains}
    return replace(one, domains=domains, layers=layers, held_out=held, sample=sample, trace=trace)


def _layer(
    one: LayerProfile, two: LayerProfile, domains: tuple[str, ...], rows: Mapping[str, np.ndarray]
) -> LayerProfile:
    if set(one.arrays) != set(two.arrays):
        odd = sorted(set(one.arrays) ^ set(two.arrays))[0]
        raise ProfileError(
            f"only one of the profiles has '{odd}' for layer {one.name}: profile both with the same statistics"
        )
    arrays = {}
    for name, a in one.arrays.items():
        b, field = two.arrays[name], FIELDS[name]
        if field.merge == "rows":
            arrays[name] = np.concatenate([a, b])[rows[field.axes[0]]]
        elif field.merge == "max":
            arrays[name] = np.maximum(a, b)
        elif "d" in field.axes:
            arrays[name] = _spread(a, one.domains, domains) + _spread(b, two.domains, domains)
        else:
            arrays[name] = a + b
    return replace(one, domains=domains, arrays=arrays)


def _spread(array: np.ndarray, own: tuple[str, ...], domains: tuple[str, ...]) -> np.ndarray:
    """[half, own domain, ...] -> [half, domain, ...], zero where a domain is new."""
    wide = np.zeros((array.shape[0], len(domains), *array.shape[2:]))
    wide[:, [domains.index(domain) for domain in own]] = array
    return wide


def _joined(one: Tokens, two: Tokens, own: tuple[str, ...], domains: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Both token lists as one; the second's domains renumbered (the first's keep their numbers)."""
    arrays = {
        name: np.concatenate([array, two.arrays[name]]) for name, array in one.arrays.items() if name in two.arrays
    }
    if "domain" in arrays and len(two):
        renumber = np.array([domains.index(domain) for domain in own], dtype=arrays["domain"].dtype)
        arrays["domain"][len(one) :] = renumber[two["domain"]]
    return arrays


def _pick_sample(one: Profile, two: Profile, domains: tuple[str, ...]) -> tuple[Tokens, np.ndarray]:
    """The tokens of smallest priority, as many as the larger of the two bounds."""
    from moekit.profile.document import Tokens

    arrays = _joined(one.sample, two.sample, two.domains, domains)
    bound = max(int(profile.options.get("sample", len(profile.sample))) for profile in (one, two))
    order = np.argsort(arrays["priority"], kind="stable")[:bound] if arrays else np.zeros(0, dtype=np.int64)
    return Tokens({name: array[order] for name, array in arrays.items()}), order


def _pick_trace(one: Profile, two: Profile, domains: tuple[str, ...]) -> tuple[Tokens, np.ndarray]:
    """Whole sequences in order, the first profile's first, until the larger of the two bounds."""
    from moekit.profile.document import Tokens

    arrays = _joined(one.trace, two.trace, two.domains, domains)
    if not arrays:
        return Tokens(), np.zeros(0, dtype=np.int64)
    if len(one.trace) and len(two.trace):
        arrays["sequence"][len(one.trace) :] += one.trace["sequence"].max() + 1
    bound = max(int(profile.options.get("trace", len(profile.trace))) for profile in (one, two))
    ends = np.flatnonzero(np.diff(arrays["sequence"], append=-1)) + 1
    kept = np.arange(int(ends[ends <= bound].max(initial=0)))
    return Tokens({name: array[kept] for name, array in arrays.items()}), kept
