"""Two profiles of one model as one: sums add, maxima stay, samples keep what a single run would have kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moekit.errors import ProfileError
from moekit.profile._reservoir import Quota, pick
from moekit.profile.layer import LayerProfile
from moekit.profile.schema import FIELDS, SAMPLE_KEYS

if TYPE_CHECKING:
    from moekit.profile.document import Profile, Tokens


def merge(one: Profile, two: Profile) -> Profile:
    two.check_source(one.source)
    if list(one.layers) != list(two.layers):
        raise ProfileError("the profiles cover different layers: profile the same checkpoint for both")
    domains = (*one.domains, *(domain for domain in two.domains if domain not in one.domains))
    trace, traced = _pick_trace(one, two, domains)
    quota = Quota(max(one.quota.tokens, two.quota.tokens), max(one.quota.balanced, two.quota.balanced))
    layers = {n: _layer(layer, two.layers[n], domains, quota, traced) for n, layer in one.layers.items()}
    held = {d: [*one.held_out.get(d, ()), *two.held_out.get(d, ())] for d in domains}
    options = {**one.options, "sample": quota.tokens, "balanced": quota.balanced}
    return replace(one, domains=domains, layers=layers, held_out=held, options=options, trace=trace)


def _layer(
    one: LayerProfile, two: LayerProfile, domains: tuple[str, ...], quota: Quota, traced: np.ndarray
) -> LayerProfile:
    if set(one.arrays) != set(two.arrays):
        odd = sorted(set(one.arrays) ^ set(two.arrays))[0]
        raise ProfileError(
            f"only one of the profiles has '{odd}' for layer {one.name}: profile both with the same statistics"
        )
    two = _renumbered(two, domains)
    rows = {"s": _pick_sample(one, two, quota), "t": traced}
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


def _renumbered(layer: LayerProfile, domains: tuple[str, ...]) -> LayerProfile:
    """The layer with its sampled tokens' domains as indices into ``domains``."""
    if "sample_domain" not in layer.arrays:
        return layer
    own = layer.array("sample_domain")
    number = np.array([domains.index(domain) for domain in layer.domains], dtype=own.dtype)
    return replace(layer, arrays={**layer.arrays, "sample_domain": number[own]})


def _pick_sample(one: LayerProfile, two: LayerProfile, quota: Quota) -> np.ndarray:
    """The tokens that a sample of both texts would hold."""
    if any(name not in one.arrays for name in SAMPLE_KEYS):
        return np.zeros(0, dtype=np.int64)
    priority, domain, expert = (
        np.concatenate([one.array(name), two.array(name)])
        for name in ("sample_priority", "sample_domain", "sample_expert")
    )
    each = quota.each(one.num_experts, one.top_k)
    return pick(priority, domain, expert, tokens=quota.tokens, each=each)


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
