"""LLEP (n 35): does shipping an overloaded expert's tokens and weights to idle ranks pay, and is the answer the same?

Setting, real gloo processes with one thread each. Exactness on 2 and 4 ranks: outputs and all gradients against one
process in float32, routings Zipf, one expert for all, a rank without tokens, unused slots, uniform; chunk 1 and
threshold 1, so that every batch is split. Plans, pure: 300 draws of Dirichlet(0.1) loads of 32768 tokens over 64
experts on 8 ranks, chunks of 1, 64, 512 and 1024. Time on 2 ranks, one per core: 8 experts of 1024 hidden units at
hidden size 512, 2048 tokens a rank, 95 % of them to one expert; plain expert parallelism and LLEP (the paper's
threshold 1.3, capacity 1.0, chunk 1024) alternate, 5 repeats after one to warm up, forward alone and with the backward;
a seed's speed-up is the ratio of the two medians. The bound on it is the ratio of the largest numbers of rows.

Rule, written before the first run. `shown` if and only if all of these hold:

1. No output or gradient is off by more than 1e-6 of the largest.
2. In every draw the largest number of rows is at most (capacity + chunk / mean) * mean, and with a chunk of 1 the
   number of weight transfers lies within its bounds in every draw.
3. The 95 % t interval over seeds of the speed-up lies above 1, for the forward and for forward with backward.

Processor seconds of the busiest rank are reported and decide nothing, nor does the part of a core that a rank got.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from moekit.contract import Routing
from moekit.formats import DenseBank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._spread import PATIENCE, Clock, bank, cpu_share, exact, figures_of, world
from moekit.parallel import Engine, Layout, LocalRanks, native, shard
from moekit.parallel.llep import LLEP, transfer_bounds

RANKS, EXPERTS, DRAWS, TOKENS, CHUNKS = 8, 64, 300, 32768, (1, 64, 512, 1024)
SHAPE = {"experts": 8, "hidden": 512, "inner": 1024, "tokens": 2048}
SKEW, REPEATS, TOLERANCE = 0.95, 5, 1e-6


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return gaps to one process, balance of plans, and measured speed-ups. ``text`` is not used."""
    gaps, times = {}, []
    with LocalRanks(4, patience=PATIENCE) as ranks:
        gaps["4"] = worst_of(ranks.ask(against_one_process))
    with LocalRanks(2, patience=PATIENCE) as ranks:
        gaps["2"] = worst_of(ranks.ask(against_one_process))
        for done, seed in enumerate(seeds):
            advance(done, len(seeds))
            times.append(ranks.ask(race, seed))
    figures = {"gap": gaps, "plans": {str(chunk): balance(chunk) for chunk in CHUNKS}, **summary(times)}
    return Outcome(shown=holds(figures), figures=figures, setting={**SHAPE, "skew": SKEW, "threads_per_rank": 1})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    same = max(figures["gap"].values()) <= TOLERANCE
    bounded = all(plan["rows_over_bound"] == 0 for plan in figures["plans"].values())
    fewest = figures["plans"]["1"]["transfers_outside_bounds"] == 0
    faster = all(figures["speed_up"][what]["low"] > 1 for what in ("forward", "training"))
    return bool(same and bounded and fewest and faster)


def summary(times: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """From the figures of every rank per seed: speed-ups with their bound, seconds, and what was sent.

    ``busiest`` compares the processor seconds of the busiest ranks: what a core for each would make of it, if nothing
    had to be waited for (modelled). ``cpu_share`` is the part of a core that a rank was given.
    """
    first = times[0][0]
    ratios: dict[str, dict[str, list[float]]] = {"wall": {}, "cpu": {}}
    for clock, kinds in ratios.items():
        for what in ("forward", "training"):
            spent = [{w: max(rank[f"{what}-{w}"][clock] for rank in ranks) for w in ("ep", "llep")} for ranks in times]
            kinds[what] = [one["ep"] / one["llep"] for one in spent]
    return {
        "speed_up": {what: figures_of(values) for what, values in ratios["wall"].items()},
        "busiest": {what: figures_of(values) for what, values in ratios["cpu"].items()},
        "speed_up_bound": statistics.mean(one[0]["rows"]["ep"] / one[0]["rows"]["llep"] for one in times),
        "cpu_share": statistics.mean(rank["cpu_share"] for ranks in times for rank in ranks),
        "seconds": {name: statistics.mean(ranks[0][name]["wall"] for ranks in times) for name in first if "-" in name},
        "most_rows": first["rows"],
        "bytes_sent_by_rank_0": first["sent"],
    }


def worst_of(answers: Sequence[Mapping[str, float]]) -> float:
    return max(max(answer.values()) for answer in answers)


def against_one_process() -> dict[str, float]:
    """On a rank: largest relative gaps over all routings, every batch being split as finely as can be."""
    here = world()
    engine = Engine(here, Layout.contiguous(6, here.size), LLEP(threshold=1, chunk=1))
    return exact(engine, bank(6, dtype=torch.float32))


def balance(chunk: int) -> dict[str, float]:
    """Plans of random skewed loads against their bounds."""
    draw, layout = np.random.default_rng(0), Layout.contiguous(EXPERTS, RANKS)
    ratios, transfers, native_ratios, over, outside = [], [], [], 0, 0
    planner = LLEP(threshold=1, chunk=chunk)
    for _ in range(DRAWS):
        load = draw.multinomial(TOKENS, draw.dirichlet([0.1] * EXPERTS))
        counts = [[int(n) // RANKS + (rank < int(n) % RANKS) for n in load] for rank in range(RANKS)]
        plan, mean = planner(counts, layout).check(counts), TOKENS / RANKS
        low, high = transfer_bounds(counts, layout)
        ratios.append(max(plan.rows()) / mean)
        native_ratios.append(max(native(counts, layout).rows()) / mean)
        transfers.append(len(plan.moves))
        over += max(plan.rows()) > (planner.capacity + chunk / mean) * mean
        outside += not low <= len(plan.moves) <= high
    return {
        "mean_of_max_over_mean": statistics.mean(ratios),
        "worst_max_over_mean": max(ratios),
        "native_max_over_mean": statistics.mean(native_ratios),
        "mean_transfers": statistics.mean(transfers),
        "rows_over_bound": over,
        "transfers_outside_bounds": outside,
    }


def race(seed: int) -> dict[str, Any]:
    """On a rank: median seconds of both ways, alternating, forward and training; most rows; bytes sent."""
    here, (shares, x, routing) = world(), skewed(seed)
    layout = Layout.contiguous(SHAPE["experts"], here.size)
    engines = {"ep": Engine(here, layout), "llep": Engine(here, layout, LLEP())}
    ways: dict[str, Callable[[Engine], Any]] = {
        "forward": lambda engine: _forward(engine, shares, x, routing),
        "training": lambda engine: engine.forward(shares, x, routing).square().sum().backward(),
    }
    clocks = {f"{what}-{name}": Clock() for what in ways for name in engines}
    sent, share = {}, []
    for repeat in range(REPEATS + 1):
        share.append(cpu_share())
        for what, way in ways.items():
            for name, engine in engines.items():
                here.traffic.clear()
                clocks[f"{what}-{name}"].time(partial(way, engine), count=repeat > 0)
                sent[f"{what}-{name}"] = here.traffic.total().nbytes
    rows = {name: max(engine.last.rows()) for name, engine in engines.items() if engine.last}
    medians = {name: clock.medians() for name, clock in clocks.items()}
    return {**medians, "rows": rows, "sent": sent, "cpu_share": statistics.mean(share)}


@torch.no_grad()
def _forward(engine: Engine, shares: DenseBank, x: torch.Tensor, routing: Routing) -> None:
    engine.forward(shares, x, routing)


def skewed(seed: int) -> tuple[DenseBank, torch.Tensor, Routing]:
    """A rank's shard, tokens and routing: one expert of rank 0 gets 95 %, the others share the rest."""
    here, experts, hidden, inner = world(), SHAPE["experts"], SHAPE["hidden"], SHAPE["inner"]
    draw = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(s, generator=draw) * 0.04 for s in ((experts, 2 * inner, hidden), (experts, hidden, inner)))
    share = shard(DenseBank(up, down), Layout.contiguous(experts, here.size), here.rank)
    share = DenseBank(share.gate_up.requires_grad_(), share.down.requires_grad_())
    draw.manual_seed(1000 * seed + here.rank)
    x = torch.randn(SHAPE["tokens"], hidden, generator=draw, requires_grad=True)
    chance = torch.full((experts,), (1 - SKEW) / (experts - 1))
    chance[0] = SKEW
    index = torch.multinomial(chance, SHAPE["tokens"], replacement=True, generator=draw).unsqueeze(1)
    return share, x, Routing(index, torch.rand(index.shape, generator=draw))
