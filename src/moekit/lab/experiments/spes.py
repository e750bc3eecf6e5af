"""SPES (n 117): do workers that each train a share of the experts end as well as workers that train all of them?

Setting: four workers in real processes (gloo) train a small stock model (4 layers, hidden size 96, 8 experts of 48,
top-2) from nothing for 64 steps of 256 tokens each; H = 8. `alike`: all draw from the embedded models' mixture.
`apart`: each has domains of its own (texts; translation and small tasks; arithmetic; the rest). Contestants: `central`
(one process on the rows of all four: the quality to reach), `averaged` (everybody trains everything, plain mean every H
steps), `spes` (two experts per worker, no merging), `spes, merging` (every H steps until step 32, strength 0.1 falling
to 0, 4 peers). Judged in bits per byte on the test split, mean over all domains.

Rule, written before the first run. `shown` if and only if
1. a worker uploads 4 (shared + experts / 4) bytes per exchange, exactly, and trains (keeps gradients and AdamW moments
   of) so many numbers, both less than `averaged`;
2. on `alike` the 95 % t interval over seeds of (spes without merging minus spes, merging) lies above zero: merging
   helps at equal tokens;
3. on `alike` the interval of (spes, merging minus averaged) does not lie wholly above zero.
The gaps to `central` and everything on `apart` are reported and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._outer_training import Work, apart_run, deal, named
from moekit.parallel._ranks import LocalRanks
from moekit.parallel.spes import Spes
from moekit.parallel.streaming_diloco import StreamingDiLoCo

WORKERS, STEPS, TOKENS, EVERY = 4, 64, 256, 8
OWN = (
    ("python", "prose", "c", "licences"),
    ("translation", "sorting", "reversing"),
    ("arithmetic",),
    ("facts", "brackets", "abstain"),
)
CENTRAL, ALL, BARE, OURS = "central", "averaged", "spes", "spes, merging"
ROWS = {
    ALL: StreamingDiLoCo(every=EVERY, layers=4, delay=0, mix=0, learning_rate=1, momentum=0, codec="float32"),
    BARE: Spes(every=EVERY, merge=0.0, merge_every=EVERY),
    OURS: Spes(every=EVERY, merge=0.1, merge_every=EVERY, merge_decay=32, peers=4),
}
WORKS = {"alike": Work(WORKERS, STEPS, TOKENS), "apart": Work(WORKERS, STEPS, TOKENS, OWN)}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses and bytes by contestant. ``text`` is not used: the mixture is what is trained on."""
    losses: dict[str, dict[str, float]] = {kind: {} for kind in WORKS}
    runs: dict[str, Any] = {}
    total, done = len(WORKS) * len(ROWS) * len(seeds) + 1, 1
    with LocalRanks(WORKERS, patience=1800) as ranks:
        tasks = [(f"{kind} {CENTRAL}", work, seed, (0, 1, 2, 3)) for kind, work in WORKS.items() for seed in seeds]
        for found in ranks.ask(deal, tasks):
            for name, loss in found.items():
                kind, _, rest = name.partition(" ")
                losses[kind][rest] = loss
        for kind, work in WORKS.items():
            for seed in seeds:
                for name, row in ROWS.items():
                    advance(done, total)
                    runs[name] = ranks.ask(apart_run, row, work, seed)[0]
                    losses[kind][f"{name} {seed}"] = runs[name]["loss"]
                    done += 1
    figures = {kind: summary(named(found, seeds)) for kind, found in losses.items()} | sizes(runs)
    setting = {**WORKS["alike"].setting, "every": EVERY, "domains_apart": OWN}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Bits per byte, and the gaps that the rule asks for."""
    return {
        "bits_per_byte": means(found),
        "gap_to_central": {name: gap(found, name, CENTRAL) for name in ROWS},
        "merging_helps_by": gap(found, BARE, OURS),
        "worse_than_averaged_by": gap(found, OURS, ALL),
    }


def sizes(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a worker trains and uploads, and what it should."""
    numbers, experts = runs[OURS]["numbers"], runs[OURS]["experts"]
    each = {
        name: {
            "trained_numbers": one["trained"],
            "moment_bytes": 8 * one["trained"],
            "uploaded": one["traffic"]["uploaded"],
        }
        for name, one in runs.items()
    }
    share = numbers - experts + experts // WORKERS
    formula = {"trained_by_formula": share, "uploaded_by_formula": 4 * share * (STEPS // EVERY)}
    return {"workers": each, "numbers": numbers, "experts": experts} | formula


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    ours, whole, alike = figures["workers"][OURS], figures["workers"][ALL], figures["alike"]
    return bool(
        ours["uploaded"] == figures["uploaded_by_formula"] < whole["uploaded"]
        and ours["trained_numbers"] == figures["trained_by_formula"] < whole["trained_numbers"]
        and alike["merging_helps_by"]["low"] > 0
        and alike["worse_than_averaged_by"]["low"] <= 0
    )
