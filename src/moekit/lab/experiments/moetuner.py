"""MoETuner (n 50): do balanced groups and links chosen for them hold on text they were not chosen by?

Setting: `moekit:mini` (8 layers, 16 experts, top-4) on 4 and 8 devices with equal links; placed by one trace, judged on
a held-out trace of the same domains and on one of other domains. Baselines: contiguous, balanced loads with equal
counts (longest processing time first), ExFlow, and the mean of 5 random placements. Tail load is the busiest device's
rows over the mean, mean over layers. The busiest link is the paper's objective, pairs of consecutive experts on the
busiest link of each step, as a share of all pairs; it is what crosses only where tokens stay with their experts. What
crosses under plain expert parallelism ("home", tokens return after every layer) is reported beside it. Devices are
counted, none is timed.

Rule, written before the first run. `shown` if and only if, at 4 and at 8 devices, the 95 % t intervals over seeds of

1. contiguous minus MoETuner and random minus MoETuner in held-out tail load lie above zero, and
2. the same in held-out busiest link; and
3. on the trace it was placed by, the busiest link is within 5 % of its bound, for every seed.

Other domains, the control (routers drawn anew), balanced loads and ExFlow decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._placing import FIT, HELD_OUT, OTHER, Traces, baselines, judged, less, means, only, swept
from moekit.parallel import _solver_links, _solver_local
from moekit.parallel._links import Grid
from moekit.parallel._traffic import Flow
from moekit.parallel.moetuner import MoETuner, clustered, links
from moekit.parallel.placement import Placement
from moekit.profile import RoutingTrace

OURS, DEVICES, CLOSE = "moetuner", (4, 8), 0.05
SEQUENCES = 12


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return tail load and busiest link by devices. ``text`` is not used: traces come from the lab's domains."""
    traces = Traces(SEQUENCES)
    found = swept(traces, seeds, DEVICES, advance, tried)
    figures = {f"{devices} devices": summary(runs) for devices, runs in found.runs.items()}
    anew = summary(found.anew)
    figures["control: routers drawn anew"] = {name: anew[name] for name in anew if name.startswith("less")}
    return Outcome(shown=holds(figures), figures=figures, setting=traces.setting)


def tried(traces: Mapping[str, RoutingTrace], devices: int, seed: int) -> dict[str, Any]:
    """One seed on so many devices: by use of the text, by placer, its figures."""
    flow, grid = Flow.of_trace(traces[FIT]), Grid.of(devices)
    placed = MoETuner().place(flow, grid)
    together = Placement(_solver_local.search(flow.pairs, devices), grid)
    every = {OURS: [placed.placement], "exflow": [together], **baselines(flow, grid, seed)}
    found: dict[str, Any] = {
        use: {
            name: judged(placements, trace) | {"busiest link": busiest(placements, trace)}
            for name, placements in every.items()
        }
        for use, trace in traces.items()
    }
    told = {"gap": placed.gap("busiest link"), "deviation": placed.value["deviation"]}
    return {**found, **told, "experts beyond room": placed.value["experts beyond room"]}


def busiest(placements: Sequence[Placement], trace: RoutingTrace) -> float:
    """The paper's second objective on a trace with equal links, as a share of all pairs; mean over placements."""
    flow, found = Flow.of_trace(trace), []
    for placement in placements:
        between = clustered(flow, placement.device, placement.devices)
        same = np.tile(np.arange(placement.devices), (flow.num_layers, 1))
        found.append(_solver_links.busiest(between, links(placement.grid, 1.0), same) / flow.total)
    return float(np.mean(found))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Intervals over seeds."""
    every = {use: means([run[use] for run in runs]) for use in (FIT, HELD_OUT)}
    found: dict[str, Any] = {
        FIT: only(every[FIT], "imbalance", "busiest link"),
        HELD_OUT: only(every[HELD_OUT], "imbalance", "busiest link", "copies, home", "copies, follow"),
    }
    for use in (HELD_OUT, OTHER):
        for figure in ("imbalance", "busiest link"):
            found[f"less {figure}, {use}"] = less([run[use] for run in runs], OURS, figure)
    largest = {name: max(run[name] for run in runs) for name in ("gap", "deviation", "experts beyond room")}
    return {**found, "largest": largest}


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    by_devices = [figures[f"{devices} devices"] for devices in DEVICES]
    gains = [
        found[f"less {figure}, {HELD_OUT}"][name]["low"]
        for found in by_devices
        for figure in ("imbalance", "busiest link")
        for name in ("contiguous", "random")
    ]
    return bool(min(gains) > 0 and all(found["largest"]["gap"] <= CLOSE for found in by_devices))
