"""Does a router over slices of a dense layer beat the best fixed half of its hidden units?

Setting: the dense sibling; its six inner layers cut into 8 slices in snake order, 4 of them active; the outer two stay
whole. Units are ranked on 16 rows of the training mixture. Contestants of a seed see the same batches of 512 tokens:

- static: the half of the units of highest score, no training;
- static-tuned: the same, its feed-forward weights trained for 80 steps at 1e-3;
- frozen: slices as they are, routers alone trained for 80 steps at 1e-2;
- full: routers for 40 steps at 1e-2, then routers and slices for 40 steps at 1e-3.

Judged in bits per byte on the test split, mean over all domains. Whole layers and untrained slices are reported too.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of three differences lie
above zero: static minus frozen, static-tuned minus full, frozen minus full. If routing does not beat the fixed half at
equal width (either of the first two), the claim is falsified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.build._dense import dense_layers
from moekit.build._split import unit_scores
from moekit.build.sparse_unified import SparseUnified
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import Ground, gap, keep_units, means
from moekit.lab.experiments._seeds import each_seed

EXPERTS, TOP_K, STEPS, ROWS = 8, 4, 80, 16
ROUTER_RATE, RATE = 1e-2, 1e-3
PAIRS = {
    "static-frozen": ("static", "frozen"),
    "tuned-full": ("static-tuned", "full"),
    "frozen-full": ("frozen", "full"),
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by contestant and the three differences. ``text`` is not used."""
    ground = Ground()
    found = each_seed(seeds, advance, lambda seed: measure(ground, seed))
    figures = summary(found)
    setting = {**ground.setting, "experts": EXPERTS, "top_k": TOP_K, "steps": STEPS}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(figures["gap"][name]["low"] > 0 for name in PAIRS)


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """``bits_per_byte`` by contestant, ``gap`` by pair."""
    return {"bits_per_byte": means(found), "gap": {name: gap(found, *pair) for name, pair in PAIRS.items()}}


def measure(ground: Ground, seed: int) -> dict[str, float]:
    """Bits per byte of every contestant for one seed."""
    losses = {"whole": ground.loss(ground.dense(), seed)}
    rows = ground.rows(seed, ROWS)
    static, patterns = _static(ground, rows)
    losses["static"] = ground.loss(static, seed)
    losses["static-tuned"] = ground.loss(ground.fit(static, seed, STEPS, RATE, patterns), seed)
    for name, (first, second) in {"untrained": (0, 0), "frozen": (STEPS, 0), "full": (STEPS // 2, STEPS // 2)}.items():
        model, names = _split(ground, rows, seed)
        if first:
            ground.fit(model, seed, first, ROUTER_RATE, [f"{layer}.router.*" for layer in names])
        if second:
            ground.fit(model, seed, second, RATE, [f"{layer}.*" for layer in names], start=first)
        losses[name] = ground.loss(model, seed)
    return losses


def _static(ground: Ground, rows: Any) -> tuple[Any, list[str]]:
    model = ground.dense()
    layers = dense_layers(model)[1:-1]
    for ffn, score in zip(layers, unit_scores(model, layers, rows), strict=True):
        order = score.sort(descending=True, stable=True).indices
        keep_units(ffn, order[: len(order) * TOP_K // EXPERTS])
    return model, [f"{ffn.name}.*" for ffn in layers]


def _split(ground: Ground, rows: Any, seed: int) -> tuple[Any, list[str]]:
    model = ground.dense()
    method = SparseUnified(experts=EXPERTS, top_k=TOP_K, seed=seed)
    return model, method.split(model, dense_layers(model)[1:-1], rows)
