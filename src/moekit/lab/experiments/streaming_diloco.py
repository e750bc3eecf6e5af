"""Streaming DiLoCo (n 127): as good as data-parallel training, in fragments, in 4 bits and without waiting?

Setting: two workers in real processes (gloo) train a small stock model (4 layers, hidden size 96, 8 experts of 48,
top-2) from nothing for 160 steps of 512 tokens each on the embedded models' mixture. H = 16, outer rate 0.4, momentum
0.9. Contestants: `data parallel` (one process on the rows of both: the quality to reach), `alone` (one worker's rows:
what no exchange gives), `diloco` (all at once, float32, waited for), `fragments` (4, float32, waited for), `overlap`
(fragments, used 1 step later, half mixed in), `streaming` (the same in 4 bits), `streaming, 4 steps late`. Judged in
bits per byte on the test split, mean over all domains. A second run of 48 steps for `diloco`, `fragments`, `overlap`
and `streaming`, used 2 steps late, goes over an emulated link of 1 MB/s (8 Mbit/s) and counts seconds spent waiting;
the bound is the time that the link needs minus the steps trained between beginning and use.

Rule, written before the first run. `shown` if and only if
1. the 95 % t interval over seeds of (streaming minus data parallel) does not lie wholly above zero and its mean is at
   most 0.05 bits per byte, and the interval of (alone minus streaming) lies above zero;
2. streaming uploads at most 1 % of the bytes of data parallel (4 bytes per number and step), and its largest exchange
   is at most 0.3 of the whole model in 4 bits (4 fragments, one with the embeddings);
3. over the emulated link it waits less than DiLoCo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._outer_training import Work, apart_run, deal, named
from moekit.parallel._codec import codec
from moekit.parallel._outer_link import SlowLink
from moekit.parallel._ranks import LocalRanks
from moekit.parallel.streaming_diloco import StreamingDiLoCo

WORKERS, STEPS, TOKENS, EVERY, FRAGMENTS = 2, 160, 512, 16, 4
SLOW, SLOW_STEPS, LATE = SlowLink(bandwidth=1e6), 48, 2
DP, ALONE, PLAIN, OURS = "data parallel", "alone", "diloco", "streaming"
ROWS = {
    PLAIN: StreamingDiLoCo(every=EVERY, layers=4, delay=0, mix=0.0, codec="float32"),
    "fragments": StreamingDiLoCo(every=EVERY, layers=1, delay=0, mix=0.0, codec="float32"),
    "overlap": StreamingDiLoCo(every=EVERY, layers=1, codec="float32"),
    OURS: StreamingDiLoCo(every=EVERY, layers=1),
    "streaming, 4 steps late": StreamingDiLoCo(every=EVERY, layers=1, delay=4),
}
WAITING = {
    PLAIN: ROWS[PLAIN],
    "fragments": ROWS["fragments"],
    "overlap": StreamingDiLoCo(every=EVERY, layers=1, codec="float32", delay=LATE),
    OURS: StreamingDiLoCo(every=EVERY, layers=1, delay=LATE),
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses, bytes and seconds by contestant. ``text`` is not used: the mixture is what is trained on."""
    work, short = Work(WORKERS, STEPS, TOKENS), Work(WORKERS, SLOW_STEPS, TOKENS)
    total = len(seeds) * len(ROWS) + len(WAITING) + 1
    with LocalRanks(WORKERS, patience=1800) as ranks:
        tasks = [(name, work, seed, who) for seed in seeds for name, who in ((DP, (0, 1)), (ALONE, (0,)))]
        losses = {name: loss for found in ranks.ask(deal, tasks) for name, loss in found.items()}
        traffic: dict[str, Any] = {}
        done = 1
        for seed in seeds:
            for name, row in ROWS.items():
                advance(done, total)
                first = ranks.ask(apart_run, row, work, seed)[0]
                losses[f"{name} {seed}"] = first["loss"]
                traffic[name] = first["traffic"] | {"numbers": first["numbers"]}
                done += 1
        waited: dict[str, Any] = {}
        for name, row in WAITING.items():
            advance(done, total)
            waited[name] = ranks.ask(apart_run, row, short, seeds[0], SLOW)
            done += 1
    figures = summary(named(losses, seeds), traffic, waited)
    setting = {**work.setting, "every": EVERY, "emulated_bytes_per_second": SLOW.bandwidth}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def summary(
    found: Sequence[Mapping[str, float]], traffic: Mapping[str, Any], waited: Mapping[str, Any]
) -> dict[str, Any]:
    """``bits_per_byte``, ``gap`` of each contestant to data parallel and of `alone` to ours, bytes, and waiting."""
    numbers = traffic[OURS]["numbers"]
    parallel = 4 * numbers * STEPS
    return {
        "bits_per_byte": means(found),
        "gap_to_data_parallel": {name: gap(found, name, DP) for name in found[0] if name != DP},
        "alone_minus_streaming": gap(found, ALONE, OURS),
        "numbers": numbers,
        "uploaded_by_data_parallel": parallel,
        "bytes": {
            name: {
                "uploaded": one["uploaded"],
                "share_of_data_parallel": one["uploaded"] / parallel,
                "largest": one["largest"],
                "largest_share_of_model": one["largest"] / codec(ROWS[name].codec).nbytes(numbers),
            }
            for name, one in traffic.items()
        },
        "emulated_link": {name: waiting(each, WAITING[name].delay) for name, each in waited.items()},
    }


def waiting(each: Sequence[Mapping[str, Any]], delay: int) -> dict[str, float]:
    """Means over workers: seconds that the link needs, the least that must be waited for, and what was."""

    def mean(name: str) -> float:
        return sum(one["traffic"][name] for one in each) / len(each)

    needed, waited = mean("needed"), mean("stalled")
    step = sum(one["seconds"] for one in each) / len(each) / SLOW_STEPS
    bound = max(0.0, needed - delay * step * mean("exchanges"))
    return {"needed_seconds": needed, "bound_seconds": bound, "waited_seconds": waited, "step_seconds": step}


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    quality, ours = figures["gap_to_data_parallel"][OURS], figures["bytes"][OURS]
    waited = {name: one["waited_seconds"] for name, one in figures["emulated_link"].items()}
    return bool(
        quality["low"] <= 0
        and quality["mean"] <= 0.05
        and figures["alone_minus_streaming"]["low"] > 0
        and ours["share_of_data_parallel"] <= 0.01
        and ours["largest_share_of_model"] <= 0.3
        and waited[OURS] < waited[PLAIN]
    )
