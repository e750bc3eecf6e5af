"""What experiments on placement share: traces of the embedded model by seed, and what a placement costs on them.

A seed draws three texts: one to place by (calibration split), one to judge on (test split, the same domains), and one
of other domains (test split). Two controls: the same model with its router weights drawn anew (normal, each layer's own
standard deviation), which routes by what tokens are but was never trained to; and the trace with the tokens of every
layer shuffled, which keeps loads and cuts all that ties a token's layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.lab.experiments import Advance
from moekit.lab.experiments._seeds import interval
from moekit.parallel._links import Grid
from moekit.parallel._solver_greedy import Baseline
from moekit.parallel._traffic import Flow, imbalance, movement
from moekit.parallel.placement import Placement
from moekit.profile import RoutingTrace, TraceRecorder
from moekit.stream import LoadedModel

DOMAINS = ("python", "prose", "c", "arithmetic")
OTHERS = ("licences", "sorting", "brackets", "translation")
FIT, HELD_OUT, OTHER = "fit", "held-out", "other domains"
LENGTH, DRAWS = 128, 5


class Traces:
    """Records traces of `moekit:mini`, or of its control; ``sequences`` of 128 tokens per domain."""

    def __init__(self, sequences: int = 24) -> None:
        source = Checkpoint.open("moekit:mini")
        self.model, self.sequences = LoadedModel.load(source, dtype=torch.float32).model, sequences
        self.setting = {
            "model": "moekit:mini",
            "fingerprint": source.fingerprint,
            "domains": list(DOMAINS),
            "other domains": list(OTHERS),
            "tokens per trace": len(DOMAINS) * sequences * LENGTH,
        }

    def of(self, domains: Sequence[str], split: str, seed: int) -> RoutingTrace:
        """One trace: every domain's sequences are read in one call."""
        with TraceRecorder(self.model) as recorder, torch.no_grad():
            for recorder.domain in domains:
                text = lab.text(recorder.domain, split, self.sequences * LENGTH + 4096, seed).encode()
                ids = torch.tensor(list(text[: self.sequences * LENGTH])).view(self.sequences, LENGTH)
                self.model(input_ids=ids, use_cache=False)
        return recorder.trace()

    def by_use(self, seed: int) -> dict[str, RoutingTrace]:
        return {
            FIT: self.of(DOMAINS, "calibration", seed),
            HELD_OUT: self.of(DOMAINS, "test", seed),
            OTHER: self.of(OTHERS, "test", seed),
        }

    def randomise(self, seed: int) -> None:
        """Turn the model into the control."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name.endswith(".mlp.gate.weight"):
                    weight.copy_(torch.randn(weight.shape, generator=draw) * weight.std())


def shuffled(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """Every layer's tokens in an order of its own."""
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(len(trace)) for _ in range(trace.num_layers)], 1)[:, :, None]
    expert, weight = (np.take_along_axis(array, order, 0) for array in (trace.expert, trace.weight))
    return replace(trace, expert=expert, weight=weight)


def baselines(flow: Flow, grid: Grid, seed: int) -> dict[str, list[Placement]]:
    """Contiguous, balanced, and several random placements."""
    one = {kind: [Baseline(kind=kind).place(flow, grid).placement] for kind in ("contiguous", "balanced")}
    dealt = [Baseline(kind="random", seed=DRAWS * seed + draw).place(flow, grid).placement for draw in range(DRAWS)]
    return {**one, "random": dealt}


def judged(placements: Sequence[Placement], trace: RoutingTrace) -> dict[str, float]:
    """Figures of some placements on a trace, mean over the placements."""
    flow, found = Flow.of_trace(trace), list[dict[str, float]]()
    for placement in placements:
        home, follow = (movement(placement, trace, flow_of) for flow_of in ("home", "follow"))
        found.append(
            {
                "crossing": flow.crossing(placement.device),
                "imbalance": imbalance(home.rows),
                "copies, home": home.copies,
                "copies, follow": follow.copies,
                "busiest link, home": home.busiest_link,
                "busiest link, follow": follow.busiest_link,
            }
        )
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def means(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same nested figures with every number a mean over the runs, to four digits: what decides nothing."""
    return {
        name: means([run[name] for run in runs])
        if isinstance(runs[0][name], Mapping)
        else float(f"{np.mean([run[name] for run in runs]):.4g}")
        for name in runs[0]
    }


def only(by_placer: Mapping[str, Mapping[str, Any]], *figures: str) -> dict[str, dict[str, Any]]:
    """Some of each placer's figures."""
    return {name: {figure: found[figure] for figure in figures} for name, found in by_placer.items()}


def less(runs: Sequence[Mapping[str, Mapping[str, float]]], ours: str, figure: str) -> dict[str, Any]:
    """Baseline minus ours in one figure, paired by run: [placer][figure] -> interval by placer."""
    others = [name for name in runs[0] if name != ours]
    return {name: interval([run[name][figure] - run[ours][figure] for run in runs]) for name in others}


Tried = Callable[[Mapping[str, RoutingTrace], int, int], dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """What a placer gave: ``runs`` [devices][seed], ``anew`` [seed] on the most devices with routers drawn anew, and
    the traces ``seen`` by seed."""

    runs: dict[int, list[dict[str, Any]]]
    anew: list[dict[str, Any]]
    seen: dict[int, dict[str, RoutingTrace]]


def swept(traces: Traces, seeds: Sequence[int], devices: Sequence[int], advance: Advance, tried: Tried) -> Sweep:
    """``tried(traces by use, devices, seed)`` for every seed on every number of devices, then with the control."""
    found = Sweep({count: [] for count in devices}, [], {seed: traces.by_use(seed) for seed in seeds})
    traces.randomise(seeds[0])
    steps = [(seed, count) for seed in seeds for count in devices]
    for done, (seed, count) in enumerate(steps):
        advance(done, len(steps))
        found.runs[count].append(tried(found.seen[seed], count, seed))
        if count == max(devices):
            found.anew.append(tried(traces.by_use(seed), count, seed))
    return found
