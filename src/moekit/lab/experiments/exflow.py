"""ExFlow (n 139): does placing by affinity keep tokens on their device, on text it was not placed by, and pay?

Setting: `moekit:mini` (8 layers, 16 experts, top-4) on 2, 4 and 8 devices; placed on the pair counts of one trace,
judged on a held-out trace of the same domains and on one of other domains. Baselines: contiguous, balanced loads, and
the mean of 5 random placements. "Crossing" is the share of ordered pairs of consecutive experts of a token that lie
apart (random: 1 - 1/P). Copies are hidden states sent between devices per token and layer: "home" under plain expert
parallelism, "follow" where the token stays with its heaviest expert. Following needs every device to hold every
sequence's keys and values: (P - 1) x kv / H more copies per token and layer, kv the width of keys and values together,
which are counted in bytes. All devices are counted, none is timed.

Rule, written before the first run. `shown` if and only if, at 2, 4 and 8 devices:

1. on the trace it was placed by, crossing is within 5 % of the proven optimum or bound, for every seed;
2. on held-out text the 95 % t intervals over seeds of contiguous minus ExFlow and random minus ExFlow in crossing lie
   above zero;
3. at 8 devices bytes with everything counted (follow with ExFlow, and the all-gather of keys and values) are fewer
   than those of home with contiguous placement, mean over seeds.

The controls at 8 devices (routers drawn anew; layers shuffled), other domains, and the width of keys and values at
which bytes tie decide nothing. The shuffled control was added after the first run, whose rule and figures it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._placing import (
    FIT,
    HELD_OUT,
    OTHER,
    Traces,
    baselines,
    judged,
    less,
    means,
    only,
    shuffled,
    swept,
)
from moekit.parallel._links import Grid
from moekit.parallel._traffic import Flow
from moekit.parallel.exflow import ExFlow
from moekit.profile import RoutingTrace

OURS, DEVICES, CLOSE = "exflow", (2, 4, 8), 0.05
ANEW, SHUFFLED = "control: routers drawn anew", "control: layers shuffled"
SEQUENCES = 24


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return crossing, copies and gaps by devices. ``text`` is not used: traces come from the lab's domains."""
    traces = Traces(SEQUENCES)
    config = traces.model.config
    kv = 2 * config.num_key_value_heads * config.head_dim
    found = swept(traces, seeds, DEVICES, advance, tried)
    figures = {f"{n} devices": summary(runs, n, kv / config.hidden_size) for n, runs in found.runs.items()}
    cut = {seed: {use: shuffled(trace, seed) for use, trace in seen.items()} for seed, seen in found.seen.items()}
    controls = {ANEW: found.anew, SHUFFLED: [tried(cut[seed], max(DEVICES), seed) for seed in seeds]}
    for name, control in controls.items():
        figures[name] = {"less crossing, held-out": less([run[HELD_OUT] for run in control], OURS, "crossing")}
    return Outcome(shown=holds(figures), figures=figures, setting=traces.setting)


def tried(traces: Mapping[str, RoutingTrace], devices: int, seed: int) -> dict[str, Any]:
    """One seed on so many devices: by use of the text, by placer, the figures of :func:`judged`."""
    flow, grid = Flow.of_trace(traces[FIT]), Grid.of(devices)
    placed = ExFlow().place(flow, grid)
    every = {OURS: [placed.placement], **baselines(flow, grid, seed)}
    found: dict[str, Any] = {
        use: {name: judged(placements, trace) for name, placements in every.items()} for use, trace in traces.items()
    }
    return {**found, "gap": placed.gap("crossing"), "bound": placed.bound["crossing"]}


def summary(runs: Sequence[Mapping[str, Any]], devices: int, width: float) -> dict[str, Any]:
    """Intervals over seeds; ``width`` is that of keys and values together over the hidden size."""
    found: dict[str, Any] = {use: means([run[use] for run in runs]) for use in (FIT, HELD_OUT, OTHER)}
    held = found[HELD_OUT]
    saved = held["contiguous"]["copies, home"] - held[OURS]["copies, follow"]
    return {
        FIT: only(found[FIT], "crossing"),
        HELD_OUT: only(held, "crossing", "imbalance", "copies, home", "copies, follow"),
        OTHER: only(found[OTHER], "crossing"),
        "less crossing, held-out": less([run[HELD_OUT] for run in runs], OURS, "crossing"),
        "less crossing, other domains": less([run[OTHER] for run in runs], OURS, "crossing"),
        "bound of crossing": means(runs)["bound"],
        "largest gap": max(run["gap"] for run in runs),
        "copies saved": saved,
        "copies for keys and values": (devices - 1) * width,
        "width of keys and values over hidden at which bytes tie": saved / (devices - 1),
    }


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    by_devices = [figures[f"{devices} devices"] for devices in DEVICES]
    close = all(found["largest gap"] <= CLOSE for found in by_devices)
    gains = [found["less crossing, held-out"][name]["low"] for found in by_devices for name in ("contiguous", "random")]
    last = by_devices[-1]
    return bool(close and min(gains) > 0 and last["copies saved"] > last["copies for keys and values"])
