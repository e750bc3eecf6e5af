"""ElasticMoE (n 95): can devices be added and taken away while requests are answered, moving the least?

Setting: the embedded model in float32, its 128 experts (19 MB) spread over processes of this machine, whose memory is
the owner's. Two client threads ask held-out prompts of 24 tokens without pause while devices go 2 -> 3 -> 4 -> 3 -> 2;
then the same with the baselines: everything copied anew, and a cold restart (all memory given back, read from disk).
A seed draws the prompts. Memory is the blocks of the owner's files, its peak noted by the owner at every layer it
copies. One process's answers (the same kernels, no other process) are the reference, bit for bit.

Rule, written before the first run. `shown` if and only if, at every step of every seed,

1. every answer is the reference's, no request fails, and the service is never closed;
2. the bytes moved are the least that can move (the matching's bound), and every expert that stays keeps its pages;
3. no device ever holds more than 3 % above the larger of its shares before and after (what a cold restart holds), and
   all together no more than the model and what moved;

and the 95 % t interval over seeds of the time to scale up (2 -> 3 -> 4) over a cold restart's lies below 1. Printed
beside it: 0.11 is the paper's, at gigabytes. Nothing here says how many requests a larger machine answers: all
processes share its cores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.checkpoint import Checkpoint
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._caching import Reader
from moekit.lab.experiments._seeds import over_seeds
from moekit.run._scaling import fewest_moves
from moekit.run._scaling_service import ElasticService, How
from moekit.run.elasticmoe import ElasticMoE
from moekit.run.expertweave import ExpertWeave
from moekit.stream import LoadedModel

STEPS = ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2], [0, 1])
LENGTH, CLIENTS, ABOVE = 24, 2, 1.03
HOWS: tuple[How, ...] = ("move", "copy", "cold")


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return times, bytes and answers by step and way, and the rule's figures. ``text`` is not used."""
    reader, found = Reader(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    service = ElasticMoE(devices=2).open(reader.setting["model"])
    try:
        for done, seed in enumerate(seeds):
            advance(done, len(seeds))
            prompts = answered(reader, seed)
            found.append(summary({how: [step(service, to, how, prompts) for to in STEPS] for how in HOWS}))
    finally:
        service.close()
        torch.set_num_threads(threads)
    figures = over_seeds(found)
    model = {name: reader.setting[name] for name in ("model", "fingerprint", "domains")}
    setting = {**model, "devices": "processes: 2, 3, 4, 3, 2", "clients": CLIENTS, "prompt": LENGTH}
    return Outcome(shown=holds(found, figures), figures=figures, setting=setting)


def holds(found: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    exact = all(one["faults"][name] == 0 for one in found for name in one["faults"])
    memory = all(one["largest peak of a device over its share"] <= ABOVE for one in found)
    return exact and memory and figures["time to scale up, move over cold"]["high"] < 1


def summary(steps: Mapping[How, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Figures of one seed."""
    ours, up = steps["move"], slice(0, 2)
    faults = {name: sum(one[name] for one in ours) for name in FAULTS}
    seconds = {how: sum(one["seconds"] for one in found[up]) for how, found in steps.items()}
    by_way = {
        how: {
            "seconds to scale up": seconds[how],
            "seconds closed": sum(one["closed"] for one in found[up]),
            "longest request, s": max(one["longest"] for one in found[up]),
            "requests during": float(sum(one["asked"] for one in found[up])),
            "moved MB": sum(one["moved"] for one in found[up]) / 1e6,
            "peak over model": max(one["peak"] for one in found),
            "answers that differ or fail": float(sum(one["different"] + one["failed"] for one in found)),
        }
        for how, found in steps.items()
    }
    return {
        "faults": faults,
        "by way": by_way,
        "longest request in quiet, s": max(one["quiet"] for one in ours),
        "largest peak of a device over its share": max(one["device peak"] for one in ours),
        "time to scale up, move over cold": seconds["move"] / seconds["cold"],
        "time to scale up, move over copy": seconds["move"] / seconds["copy"],
    }


FAULTS = ("different", "failed", "closed", "off the bound", "pages lost", "peak above")


def step(
    service: ElasticService, to: Sequence[int], how: How, prompts: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """One change of devices under fire."""
    old = service.epoch
    counts = [torch.bincount(row, minlength=8) for row in old.device]
    experts = old.device.shape[1]
    least = sum(fewest_moves([int(count[d]) for d in to], experts, len(to)) for count in counts)
    each = service.expert_bytes // old.device.numel()
    with Clients(service, prompts) as clients:
        clients.until(2 * CLIENTS)
        quiet, first = clients.longest(0), len(clients.times)
        started = time.perf_counter()
        found = service.scale(to, how)
        clients.until(len(clients.times) + CLIENTS)
        longest, asked = clients.longest(started), len(clients.times) - first
    before, after = found.frames
    stay = [key for key in before if int(service.epoch.device[key]) == int(old.device[key])]
    now = [torch.bincount(row, minlength=8) for row in service.epoch.device]
    shares = {d: each * max(sum(int(c[d]) for c in counts), sum(int(c[d]) for c in now)) for d in range(4)}
    peaks = {int(name): value for name, value in found.peak.items() if name != "all"}
    return {
        "different": float(clients.different),
        "failed": float(len(clients.errors)),
        "closed": found.closed_seconds,
        "off the bound": float(abs(found.moved_bytes - least * each)),
        "pages lost": float(sum(before[key] != after[key] for key in stay)),
        "peak above": float(max(0, found.peak["all"] - service.expert_bytes - found.moved_bytes)),
        "seconds": found.seconds,
        "moved": found.moved_bytes,
        "peak": found.peak["all"] / service.expert_bytes,
        "device peak": max(peaks[d] / share for d, share in shares.items() if share and d in peaks),
        "longest": longest,
        "quiet": quiet,
        "asked": asked,
    }


def answered(reader: Reader, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Prompts [1, S], and what one process answers."""
    model = LoadedModel.load(Checkpoint.open(reader.setting["model"]), dtype=torch.float32).model
    ExpertWeave(adapters=1, most=1).open(model)
    prompts = [row[None, :LENGTH] for rows in reader.rows("test", seed, 2).values() for row in rows]
    with torch.no_grad():
        return [(ids, model(ids).logits) for ids in prompts]


class Clients:
    """Threads that ask without pause while the context is open."""

    def __init__(self, service: ElasticService, prompts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.service, self.prompts = service, prompts
        self.times: list[tuple[float, float]] = []
        self.errors: list[Exception] = []
        self.different = 0
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[i], daemon=True) for i in range(CLIENTS)]

    def until(self, count: int) -> None:
        """Wait until that many answers have come, or a request failed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.times) >= count or self.errors, 300)

    def longest(self, since: float) -> float:
        """Seconds, of the requests that ended after ``since``."""
        with self._changed:
            return max((end - start for start, end in self.times if end > since), default=0.0)

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)

    def _ask(self, turn: int) -> None:
        while not self._stop.is_set():
            ids, expected = self.prompts[turn % len(self.prompts)]
            turn, start = turn + CLIENTS, time.perf_counter()
            try:
                same = torch.equal(self.service.ask(ids), expected)
            except Exception as error:  # every failure counts
                with self._changed:
                    self.errors.append(error)
                    self._changed.notify_all()
                return
            with self._changed:
                self.different += not same
                self.times.append((start, time.perf_counter()))
                self._changed.notify_all()
