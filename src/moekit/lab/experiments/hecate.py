"""Hecate (n 69): do experts lent by predicted load balance a training run better than a fixed choice of hot experts?

Setting. Exactness on 4 real gloo processes as 2 nodes of 2: outputs, gradients and the weights after 5 steps of Adam
against one process, batches of changing skew, with and without rematerialisation; bytes of the sparse all-gather and
reduce-scatter against copies times the size of an expert. Balance: a language model with 4 sparse layers of 8 experts,
top-2, is trained from nothing for 160 steps of 512 tokens without a balance loss, and its routing of every step is
recorded; the tokens of a step are shared out over 4 ranks in order, and plans are compared on them (nothing but the
loads is simulated). Steps 80 on are judged. Every contestant lends at most t = 4 experts in m = 2 slots a rank:
none (expert parallelism), static (by the mean loads of steps 0 to 79), Hecate (mean of the last 5), Hecate calibrated
(one more slot, which costs 16 rows to use), oracle (the step's own loads). A figure is the mean over steps and layers
of the busiest rank's rows over the mean.

Rule, written before the first run. `shown` if and only if all of these hold:

1. No output or gradient is off by more than 1e-6 of the largest (float32), the weights after Adam by no more than 1e-6
   (float64), and each rank holds optimiser state for its own experts alone.
2. Bytes of weights and of gradients equal copies times the size of an expert.
3. The 95 % t intervals over seeds of static minus Hecate and of expert parallelism minus Hecate lie above zero.

Reported, deciding nothing: the share of tokens that cross nodes, and a static choice by the judged steps' own means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moekit.formats import DenseBank
from moekit.kernels._layer import Layer
from moekit.kernels.training import autograd
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._spread import PATIENCE, bank, batch, exact, loss, world
from moekit.parallel import DispatchPlan, Engine, Grid, Layout, LocalRanks, native, shard, unshard
from moekit.parallel._stage import Stage
from moekit.parallel.hecate import Hecate, materialise, nearest

STEPS, HALF, TOKENS, LENGTH, RATE = 160, 80, 512, 128, 3e-3
HIDDEN, LAYERS, WIDTH, EXPERTS, TOP_K = 96, 4, 64, 8, 2
OVERLAP, EXTRA, EXPOSED, ADAM_STEPS, TOLERANCE = 4, 2, 16.0, 5, 1e-6
GRID = Grid(2, 2)
CONTESTANTS = ("ep", "static", "static-hindsight", "hecate", "hecate-calibrated", "oracle")


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return gaps to one process, counted bytes, and balance by contestant. ``text`` is not used."""
    from moekit.lab.experiments._building import gap, means

    with LocalRanks(4, patience=PATIENCE) as ranks:
        answers = ranks.ask(against_one_process)
        figures: dict[str, Any] = {name: max(one[name] for one in answers) for name in ("gap", "adam_gap")}
        figures["foreign_state"] = sum(one["foreign_state"] for one in answers)
        figures["bytes"] = {what: sum(one["bytes"][what] for one in answers) for what in answers[0]["bytes"]}
    found = []
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        found.append(contest(recorded(seed)))
    figures |= {
        "max_over_mean": means([one["max_over_mean"] for one in found]),
        "inter_node_share": means([one["inter_node_share"] for one in found]),
        "copies": means([one["copies"] for one in found]),
        "gain": {name: gap([one["max_over_mean"] for one in found], name, "hecate") for name in CONTESTANTS},
    }
    return Outcome(shown=holds(figures), figures=figures, setting={"steps": STEPS, "ranks": 4, "nodes": 2})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    same = max(figures["gap"], figures["adam_gap"]) <= TOLERANCE and figures["foreign_state"] == 0
    counted = figures["bytes"]["weights"] == figures["bytes"]["gradients"] == figures["bytes"]["formula"]
    return bool(same and counted and all(figures["gain"][name]["low"] > 0 for name in ("static", "ep")))


def against_one_process() -> dict[str, Any]:
    """On a rank: largest gaps, what Adam holds that is not this rank's, and bytes of one training step."""
    here, layout = world(2), Layout(4, (0, 0, 0, 1, 2, 0))
    whole = bank(6, dtype=torch.float32)
    gaps = [
        max(exact(Engine(here, layout, Hecate(GRID), rematerialise=again), whole).values()) for again in (False, True)
    ]
    engine = Engine(here, layout, Hecate(GRID))
    adam_gap, foreign_state = adam(engine)
    here.traffic.clear()
    x, routing = batch("zipf", here.rank, 6)
    loss(engine.forward(own_share(engine), x, routing)).backward()
    assert engine.last is not None
    lent = sum(move.source == here.rank for move in engine.last.moves)
    sent = {what: here.traffic.total(what).nbytes for what in ("weights", "gradients")}
    return {
        "gap": max(gaps),
        "adam_gap": adam_gap,
        "foreign_state": foreign_state,
        "bytes": {**sent, "formula": lent * bank(6).nbytes // 6},
    }


def own_share(engine: Engine) -> DenseBank:
    """This rank's experts of a float64 bank of 6, as leaves to be trained."""
    share = shard(bank(6), engine.layout, engine.world.rank)
    return replace(share, **{name: t.detach().clone().requires_grad_() for name, t in share.tensors().items()})


def adam(engine: Engine) -> tuple[float, int]:
    """On a rank: (largest gap of any weight to one process after a few steps, numbers of state beyond its own)."""
    here, share = engine.world, own_share(engine)
    whole = replace(bank(6), **{name: t.detach().clone().requires_grad_() for name, t in bank(6).tensors().items()})
    ours, theirs = (torch.optim.Adam(list(one.tensors().values()), lr=1e-2) for one in (share, whole))
    for step in range(ADAM_STEPS):
        kind = ("zipf", "one-hot", "uniform")[step % 3]
        outs = [engine.forward(share, *batch(kind, here.rank, 6, step))]
        for rank in range(here.size):
            x, routing = batch(kind, rank, 6, step)
            outs.append(autograd(Layer.of_bank(whole), x, routing.expert, routing.weight))
        for optimiser, goal in ((ours, loss(outs[0])), (theirs, sum(map(loss, outs[1:]), torch.zeros(())))):
            optimiser.zero_grad()
            goal.backward()
            optimiser.step()
    back = unshard(here, engine.layout, share).tensors()
    off = max(float((back[name] - t).detach().abs().max()) for name, t in whole.tensors().items())
    held = sum(t.numel() for state in ours.state.values() for t in state.values() if t.dim())
    return off, held - 2 * sum(t.numel() for t in share.tensors().values())


def recorded(seed: int) -> list[list[np.ndarray]]:
    """Train a model from nothing: expert ids [tokens, K] of every step and layer."""
    # ranks import this module too, and need none of these
    from transformers import AutoModelForCausalLM

    from moekit import lab
    from moekit.blocks import blocks
    from moekit.lab._recipe import RECIPES
    from moekit.lab.experiments._building import LM
    from moekit.train import TrainOptions, distil

    recipe = replace(
        RECIPES["moe"],
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        intermediate_size=WIDTH,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(recipe.config(), dtype=torch.float32)
    seen: list[np.ndarray] = []
    hooks = [block.observe(lambda o: seen.append(o.routing.expert.cpu().numpy())).attach() for block in blocks(model)]
    distil(model, None, lab.mixture(seed, TOKENS, LENGTH), TrainOptions(steps=STEPS, learning_rate=RATE, seed=seed), LM)
    for hook in hooks:
        hook.remove()
    return [seen[start : start + LAYERS] for start in range(0, len(seen), LAYERS)]


def shared_out(ids_TK: np.ndarray) -> list[list[int]]:
    """[W][E]: a step's tokens dealt to the ranks in equal runs."""
    parts = np.array_split(ids_TK, GRID.world)
    return [np.bincount(part[part >= 0], minlength=EXPERTS).tolist() for part in parts]


def contest(steps: Sequence[Sequence[np.ndarray]]) -> dict[str, dict[str, float]]:
    """What every contestant makes of the judged steps, mean over steps and layers."""
    layout = Layout.contiguous(EXPERTS, GRID.world)
    figures: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in CONTESTANTS} for what in ("max_over_mean", "inter_node_share", "copies")
    }
    for layer in range(LAYERS):
        counts = [shared_out(step[layer]) for step in steps]
        loads = np.array([np.sum(one, 0) for one in counts])
        fixed = {
            "static": _lent(loads[:HALF].mean(0), layout),
            "static-hindsight": _lent(loads[HALF:].mean(0), layout),
        }
        learners = {
            "hecate": Hecate(GRID, OVERLAP, EXTRA),
            "hecate-calibrated": Hecate(GRID, OVERLAP, EXTRA, spare=1, exposed=EXPOSED),
        }
        for step, one in enumerate(counts):
            plans = {"ep": native(one, layout)}
            plans |= {name: nearest(one, layout, GRID, copies) for name, copies in fixed.items()}
            plans |= {name: learner(one, layout) for name, learner in learners.items()}
            plans["oracle"] = nearest(one, layout, GRID, _lent(loads[step], layout))
            if step >= HALF:
                for name, plan in plans.items():
                    rows = plan.check(one).rows()
                    figures["max_over_mean"][name].append(max(rows) * GRID.world / sum(rows))
                    figures["inter_node_share"][name].append(_crossing(plan, one) / sum(rows))
                    figures["copies"][name].append(len(plan.moves))
    return {what: {name: float(np.mean(v)) for name, v in one.items()} for what, one in figures.items()}


def _lent(load: np.ndarray, layout: Layout) -> Any:
    return materialise(load.tolist(), layout, GRID, OVERLAP, EXTRA)


def _crossing(plan: DispatchPlan, counts: list[list[int]]) -> int:
    """Rows whose rank is on another node than their token's."""
    rows = Stage.of(plan, counts, 0).rows
    ranks = range(GRID.world)
    return sum(rows[a][b] for a in ranks for b in ranks if GRID.level(a, b) == "inter")
