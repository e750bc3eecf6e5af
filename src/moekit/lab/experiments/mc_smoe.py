"""MC-SMoE (n 18, second half): after merging, are low rank and a few whole rows, trained, the best use of the bytes?

Setting: the embedded model merged by M-SMoE to half of its experts, then every matrix as rank 16 (of 64) plus a tenth
of the remainder's rows. Recovery is distillation from the source as in the experiment of M-SMoE (12 steps, experts
alone), here with the rows pruned to the tenth by gradients on the cubic schedule. Baselines at no fewer bytes, with the
same steps on the same batches: low rank alone, on the same merge and schedule, with the rank (22) that the rows' bytes
pay for; and merging on (to 4 experts per layer) instead of factoring. Judged by KL divergence from the source on 1 KB
of each of four domains' test split, per seed.

Rule, written before the first run. `shown` if and only if, after recovery, the 95 % t interval over seeds of (baseline
minus MC-SMoE) lies above zero for both baselines. Rows that do not pay for their bytes in rank falsify the paper's
low-rank-plus-sparse form; merging on being as good falsifies the second stage as a whole. Losses without recovery (the
plan's own: largest rows) are reported and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from moekit.compress.mc_smoe import train_merged, trained_bank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._recovering import hold_tied, read_tied, recovered
from moekit.lab.experiments._trial import Trial, by_method
from moekit.plan import Plan
from moekit.train.schedule import RowPruning

OURS, LOW, MERGED = "low rank + rows", "low rank alone", "merged on"
SHAPES = {OURS: (16, 0.1), LOW: (22, 0.0)}
"""Rank, and the share of rows."""
STEPS = 12


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return KL by method before and after recovery, and the bytes of each. ``text`` is not used."""
    trial = Trial(calibration=2048, test=1024, sample=256)
    losses: dict[str, dict[str, list[float]]] = {"untrained": {}, "recovered": {}}
    nbytes: dict[str, list[int]] = {}
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        for name, (plan, after) in contestants(trial, seed).items():
            losses["untrained"].setdefault(name, []).append(trial.loss(plan, seed))
            losses["recovered"].setdefault(name, []).append(trial.loss(after, seed))
            nbytes.setdefault(name, []).append(trial.nbytes(after))
    figures: dict[str, Any] = {when: by_method(found, OURS) for when, found in losses.items()}
    figures["share of bytes"] = {name: max(found) / trial.whole_bytes for name, found in nbytes.items()}
    fair = all(min(nbytes[name]) >= max(nbytes[OURS]) for name in (LOW, MERGED))
    setting = {**trial.setting, "steps": STEPS, "baselines have no fewer bytes": fair}
    return Outcome(shown=fair and holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(figures["recovered"][name]["gap"]["low"] > 0 for name in (LOW, MERGED))


def contestants(trial: Trial, seed: int) -> dict[str, tuple[Plan, Plan]]:
    """The plan without and with recovery, of all."""
    found = {}
    merge = trial.plan("m-smoe:keep=0.5", seed)
    for name, (rank, rows) in SHAPES.items():
        plan = trial.plan(f"mc-smoe:keep=0.5,rank={rank},rows={rows}", seed)

        hold = partial(train_merged, rank=rank)
        pruning = partial(RowPruning, steps=STEPS, final=rows)
        found[name] = plan, recovered(trial, merge, seed, STEPS, hold, trained_bank, pruning)
    further = trial.plan("m-smoe:keep=4", seed)
    return found | {MERGED: (further, recovered(trial, further, seed, STEPS, hold_tied, read_tied))}
