"""Tutel (n 83): is every parallelism the same layer, and does switching between them really move nothing?

Setting: 4 real gloo processes as 2 nodes of 2, one thread each; 1, 2 and 4 experts, so that 4, 2 and 1 ranks share one;
every degree of each layout, 1, 2 and 4 chunks, flat and two-level all-to-all, routings Zipf, one expert for all, a rank
without tokens, unused slots, uniform; float32 against one process. Bytes are counted at hidden size 32 and width 64,
48 tokens a rank, top-1. Switching: 8 steps of plain gradient descent, another degree at each, against degree 1
throughout, in float64. Crossover: the number of tokens from which gathering weights (degree 1) sends fewer bytes than
repeating tokens (degree s), found by counting at rising numbers, against the formula. Time on 2 ranks: one expert of
width 1024 at hidden size 256 in two slices, 64 and 1024 tokens a rank, degrees 0, 1 and 2 with 1, 2 and 4 chunks.

Rule, written before the first run. `shown` if and only if all of these hold:

1. No output or gradient is off by more than 1e-6 of the largest, in any combination.
2. Switching leaves the stored weights bit for bit as they were and where they were in memory; training with a switch
   at every step ends within 1e-12 of training without.
3. Bytes of weights and tokens equal their formulas for every degree, and two-level sends one message between nodes a
   rank where flat sends two.
4. The counted crossover lies within one token a rank of the formula's.

Times, and what the adaptive choice would take, are reported and decide nothing: two cores are shared with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moekit.bank import SILU_MUL
from moekit.contract import Routing
from moekit.formats import DenseBank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._spread import PATIENCE, Clock, bank, batch, cpu_share, exact, loss, world
from moekit.parallel import Engine, Layout, LocalRanks, flat, shard, two_level, unshard
from moekit.parallel.tutel import Adaptive, Degree, degrees, stored_layout

EXPERTS, CHUNKS, TOLERANCE, REPEATS, STEPS = (1, 2, 4), (1, 2, 4), 1e-6, 3, 8
HIDDEN, WIDTH, TOKENS = 32, 64, 48


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return gaps, traffic against formulas, what switching changed, crossover and times. ``text`` is not used."""
    with LocalRanks(4, patience=PATIENCE) as ranks:
        gaps = {}
        for done, experts in enumerate(EXPERTS):
            advance(done, len(EXPERTS) + len(seeds))
            gaps[str(experts)] = max(max(one.values()) for one in ranks.ask(against_one_process, experts))
        switch = {str(experts): ranks.ask(switched, experts)[0] for experts in EXPERTS}
        traffic = {str(experts): added(ranks.ask(counted, experts, TOKENS)) for experts in EXPERTS}
        crossover = {str(experts): found(ranks, experts) for experts in (1, 2)}
    times = []
    with LocalRanks(2, patience=PATIENCE) as ranks:
        for done, seed in enumerate(seeds):
            advance(len(EXPERTS) + done, len(EXPERTS) + len(seeds))
            times.append(ranks.ask(timed, seed)[0])
    figures = {"gap": gaps, "switch": switch, "traffic": traffic, "crossover": crossover, "times": times[-1]}
    return Outcome(shown=holds(figures), figures=figures, setting={"ranks": 4, "nodes": 2, "chunks": list(CHUNKS)})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    same = max(figures["gap"].values()) <= TOLERANCE
    still = all(one["unmoved"] and one["training_gap"] <= 1e-12 for one in figures["switch"].values())
    sent = [degree for one in figures["traffic"].values() for degree in one["degrees"].values()]
    bytes_right = all(one["bytes"] == one["formula"] for one in sent)
    fewer = all(one["inter_messages"] == {"flat": 8, "two_level": 4} for one in figures["traffic"].values())
    crosses = all(abs(one["counted"] - one["formula"]) <= 1 for one in figures["crossover"].values())
    return bool(same and still and bytes_right and fewer and crosses)


def against_one_process(experts: int, depths: Sequence[int] = CHUNKS) -> dict[str, float]:
    """On a rank: largest relative gaps, named by degree, chunks and exchange."""
    here, layout, whole = world(2), stored_layout(experts, 4), bank(experts, dtype=torch.float32)
    return {
        f"degree {degree}, {chunks} chunks, {exchange.__name__}": max(
            exact(Engine(here, layout, Degree(degree), exchange, chunks), whole).values()
        )
        for degree in degrees(layout)
        for chunks in depths
        for exchange in (flat, two_level)
    }


def switched(experts: int) -> dict[str, Any]:
    """On a rank: whether running every degree left the weights alone, and what training with switches changed."""
    here, layout, whole = world(2), stored_layout(experts, 4), bank(experts)
    x, routing = batch("zipf", here.rank, experts)
    engines = [Engine(here, layout, Degree(degree)) for degree in degrees(layout)]
    ends, unmoved = [], True
    for choice in (engines, engines[1:2]):
        share = shard(whole, layout, here.rank)
        weights = [t.detach().clone().requires_grad_() for t in share.tensors().values()]
        share = DenseBank(weights[0], weights[1], weights[2], weights[3], SILU_MUL)
        before, places = [w.clone() for w in weights], [w.data_ptr() for w in weights]
        with torch.no_grad():
            for engine in choice:
                engine.forward(share, x, routing)
        unmoved &= all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        for step in range(STEPS):
            grads = torch.autograd.grad(loss(choice[step % len(choice)].forward(share, x, routing)), weights)
            with torch.no_grad():
                for weight, grad in zip(weights, grads, strict=True):
                    weight -= 1e-3 * grad
        unmoved &= places == [w.data_ptr() for w in weights]
        ends.append(unshard(here, layout, share).tensors())
    gap = max(float((ends[0][name] - tensor).abs().max()) for name, tensor in ends[1].items())
    return {
        "unmoved": unmoved,
        "training_gap": gap,
        "trained": float((ends[0]["down"] - whole.down).detach().abs().max()),
    }


def plain(
    experts: int, tokens: int, hidden: int = HIDDEN, width: int = WIDTH
) -> tuple[DenseBank, torch.Tensor, Routing]:
    """A bank without biases, this rank's tokens and a top-1 routing that takes the experts in turn."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    whole = DenseBank(torch.randn(experts, 2 * width, hidden) * 0.1, torch.randn(experts, hidden, width) * 0.1)
    index = (torch.arange(tokens) % experts).unsqueeze(1)
    return whole, torch.randn(tokens, hidden, generator=draw), Routing(index, torch.ones(tokens, 1))


def counted(experts: int, tokens: int) -> dict[str, Any]:
    """On a rank: bytes of weights, and of tokens with those that stay, by degree; messages between nodes."""
    here, layout = world(2), stored_layout(experts, 4)
    whole, x, routing = plain(experts, tokens)
    share, one = shard(whole, layout, here.rank), whole.nbytes // experts
    by_degree, messages = {}, {}
    for degree in degrees(layout):
        here.traffic.clear()
        Engine(here, layout, Degree(degree)).run(share, x, routing)
        stayed = here.traffic.total("tokens", "self").nbytes
        by_degree[str(degree)] = {
            "bytes": [here.traffic.total("weights").nbytes, here.traffic.total("tokens").nbytes + stayed],
            "formula": _formula(degree, layout, one, tokens),
            "crossing": here.traffic.total(["weights", "tokens", "outputs"]).nbytes,
        }
    for exchange in (flat, two_level):
        here.traffic.clear()
        exchange(here, torch.zeros(4, 1), [[1] * 4] * 4, "probe").wait()
        messages[exchange.__name__] = here.traffic.total("probe", "inter").messages
    return {"degrees": by_degree, "inter_messages": messages}


def _formula(degree: int, layout: Layout, expert_bytes: int, tokens: int) -> list[int]:
    """Bytes [weights, tokens] that one rank sends: slices to its group, and each token to ``degree`` ranks."""
    own = len(layout.own(0)) * expert_bytes // layout.slices
    receivers = layout.world - 1 if degree == 0 else layout.slices // degree - 1
    return [receivers * own, max(degree, 1) * tokens * HIDDEN * 4]


def added(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over ranks."""
    names = answers[0]["degrees"]
    return {
        "degrees": {
            name: {
                what: [sum(column) for column in zip(*(a["degrees"][name][what] for a in answers), strict=True)]
                for what in ("bytes", "formula")
            }
            | {"crossing": sum(a["degrees"][name]["crossing"] for a in answers)}
            for name in names
        },
        "inter_messages": {
            name: sum(a["inter_messages"][name] for a in answers) for name in answers[0]["inter_messages"]
        },
    }


def found(ranks: LocalRanks, experts: int) -> dict[str, float]:
    """Tokens a rank from which degree 1 sends fewer bytes than degree s: counted by bisection, and by formula.

    Rows that stay on their rank cross no link. At degree s a token meets all s ranks of its group, of which s / W are
    its own on average; at degree 1 it meets one, its own always if the group is all ranks (the tokens of an expert are
    shared out in the order of their ranks), else once in W. Outputs come back the same ways. Weights, at degree 1:
    (s - 1) / s of an expert to every rank.
    """
    layout = stored_layout(experts, 4)
    low, high = 0, 4096
    while high - low > 1:
        middle = (low + high) // 2
        crossing = added(ranks.ask(counted, experts, middle))["degrees"]
        cheaper = crossing["1"]["crossing"] < crossing[str(layout.slices)]["crossing"]
        low, high = (low, middle) if cheaper else (middle, high)
    slices = layout.slices
    weights = (slices - 1) / slices * 3 * HIDDEN * WIDTH
    rows = (slices - slices / 4) - (1 - (1 if experts == 1 else 1 / 4))
    return {"counted": high, "formula": weights / (2 * rows * HIDDEN)}


def timed(seed: int) -> dict[str, Any]:
    """On a rank of two: wall and processor seconds of a forward, and the candidate that the adaptive choice keeps."""
    here, layout = world(), stored_layout(1, 2)
    result: dict[str, Any] = {"cpu_share": cpu_share()}
    for tokens in (64, 1024):
        torch.manual_seed(seed)
        whole, x, routing = plain(1, tokens, 256, 1024)
        share = shard(whole, layout, here.rank)
        engines = {
            f"degree {degree}, {chunks} chunks": Engine(here, layout, Degree(degree), chunks=chunks)
            for degree in degrees(layout)
            for chunks in (CHUNKS if degree else (1,))
        }
        clocks = {name: Clock() for name in engines}
        with torch.no_grad():
            for repeat in range(REPEATS + 1):
                for name, engine in engines.items():
                    clocks[name].time(partial(engine.forward, share, x, routing), count=repeat > 0)
            adaptive = Adaptive(list(engines.values()))
            for _ in engines:
                adaptive.forward(share, x, routing)
        kept = next(name for name, engine in engines.items() if engine is adaptive.best(0))
        result[str(tokens)] = {**{name: clock.medians() for name, clock in clocks.items()}, "adaptive": kept}
    return result
