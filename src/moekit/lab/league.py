"""Recipes against each other at equal compute, by the one protocol: a table, a picture, and the document of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from moekit.errors import OptionError
from moekit.lab.experiments import Advance
from moekit.lab.experiments._league import BASE, DOMAINS, USED, batches, contestant, play, size_of_step
from moekit.measure import Interval
from moekit.train.recipe import Recipe, carry_out, recipes

CLOSE = 0.05
"""Share by which a recipe's compute may differ from the plain one's before its steps are changed."""
ROUNDS, PACE = 3, 6
"""How often all recipes take turns at being timed, and for how many steps."""

_COLUMNS = (
    "recipe",
    "bits per byte",
    "lead over plain",
    "compute",
    "steps",
    "active",
    "total",
    "MaxVio",
    "specialisation",
    "step time",
    "tokens/s",
)
_INTERVALS = """intervals are 95 % t intervals over them, of a recipe's own figure and of its lead over the plain
recipe seed by seed (above zero: better than plain). What this says holds for models of this size, trained this long."""
_LEGEND = """compute: active parameters times tokens of the training over the plain recipe's; active: on the judge's
text; MaxVio: mean over layers; specialisation: bits that an expert's name tells of the domain, mean over layers; step
time: processor time of a training step over the plain recipe's, and tokens/s of training per second of processor time,
timed in turns (its whole schedule in a few steps)."""


@dataclass(frozen=True)
class Standing:
    """One recipe over all seeds; ``compute`` (active parameters times tokens) and ``step_time`` are over plain ones,
    ``speed`` is tokens trained on per second of processor time."""

    recipe: str
    steps: int
    bits_per_byte: Interval
    lead: Interval
    domains: dict[str, float]
    total: int
    active: int
    compute: float
    max_violation: float
    specialisation: float
    step_time: float
    speed: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def entrants(keys: Sequence[str]) -> dict[str, Recipe]:
    """Recipes by key, the plain one first; all that come with the package where none is named.

    Raises:
        OptionError: there is none of a name.
    """
    named = list(keys) or [key for key in recipes() if key != BASE]
    return {key: contestant(key) for key in dict.fromkeys([BASE, *named])}


def equal(entered: Mapping[str, Recipe], seed: int, turn: Callable[[int], None]) -> dict[str, Recipe]:
    """Every recipe with as many steps as make its compute that of the plain one; within 5 % they stay.

    What a token uses is counted while a recipe trains with its own steps on one seed: schedules and learnt gates change
    it on the way. ``turn`` is called with the number of recipes done before each.
    """
    out, plain = dict[str, Recipe](), play(entered[BASE], seed)[USED]
    for number, (key, recipe) in enumerate(entered.items()):
        turn(number)
        ratio = plain / play(recipe, seed)[USED]
        close = abs(ratio - 1) <= CLOSE
        out[key] = recipe if close else recipe.with_options(steps=max(1, round(recipe.options.steps * ratio)))
    return out


def standings(entered: Mapping[str, Recipe], seeds: Sequence[int], advance: Advance) -> list[Standing]:
    """Every recipe trained and judged at equal compute, the best first.

    Raises:
        OptionError: fewer than two seeds.
    """
    if len(set(seeds)) < 2:
        raise OptionError("an interval needs at least two different seeds")
    many, found = len(entered), dict[str, list[dict[str, Any]]]()
    total = many * (2 + ROUNDS)
    matched = equal(entered, seeds[0], lambda done: advance(done, total))
    for number, (key, recipe) in enumerate(matched.items()):
        advance(many + number, total)
        found[key] = [play(recipe, seed) for seed in seeds]
    rounds = paces(matched, lambda done: advance(2 * many + done, total))
    rows = [_standing(key, matched[key], found[key], found[BASE], matched[BASE], rounds) for key in matched]
    return sorted(rows, key=lambda row: row.bits_per_byte.mean)


def paces(entered: Mapping[str, Recipe], turn: Callable[[int], None]) -> list[dict[str, float]]:
    """Seconds of processor time that a training step takes, round by round, in each of which all take their turn.

    ``turn`` is called with the number of turns taken before each.
    """
    rounds = list[dict[str, float]]()
    for _ in range(ROUNDS):
        taken = dict[str, float]()
        for key, recipe in entered.items():
            turn(len(rounds) * len(entered) + len(taken))
            taken[key] = _pace(recipe)
        rounds.append(taken)
    return rounds


def _pace(recipe: Recipe) -> float:
    """Seconds of processor time that a step takes, the first left out."""
    ended: list[float] = []
    brief = recipe.with_options(steps=PACE + 1, seed=0)
    carry_out(brief, batches(brief), after_step=lambda *_: ended.append(time.process_time()))
    return (ended[-1] - ended[0]) / PACE


def _standing(
    key: str,
    recipe: Recipe,
    runs: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    base: Recipe,
    rounds: Sequence[Mapping[str, float]],
) -> Standing:
    def mean(figure: str) -> float:
        return sum(float(run[figure]) for run in runs) / len(runs)

    tokens = recipe.options.steps * size_of_step(recipe)
    usual = base.options.steps * size_of_step(base) * plain[0][USED]
    return Standing(
        recipe=key,
        steps=recipe.options.steps,
        bits_per_byte=Interval.over_seeds([run["bits_per_byte"] for run in runs]),
        lead=Interval.over_seeds([b["bits_per_byte"] - a["bits_per_byte"] for a, b in zip(runs, plain, strict=True)]),
        domains={domain: sum(run["bits"][domain] for run in runs) / len(runs) for domain in DOMAINS},
        total=round(mean("total")),
        active=round(mean("active")),
        compute=mean(USED) * tokens / usual,
        max_violation=mean("max_violation"),
        specialisation=mean("specialisation"),
        step_time=median(one[key] / one[BASE] for one in rounds),
        speed=median(size_of_step(recipe) / one[key] for one in rounds),
    )


def markdown(rows: Sequence[Standing], seeds: Sequence[int], about: str) -> str:
    """The document: what was done, the table, what its columns mean."""
    lines = [
        "# Architectures side by side",
        "",
        about,
        "",
        f"Seeds {', '.join(map(str, seeds))}; {_INTERVALS}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| --- |" + " --- |" * (len(_COLUMNS) - 1),
    ]
    for row in rows:
        lines.append(
            f"| {row.recipe} | {row.bits_per_byte} | {row.lead} | {row.compute:.2f} | {row.steps} | {row.active:,} | "
            f"{row.total:,} | {row.max_violation:.2f} | {row.specialisation:.3f} | {row.step_time:.2f} | "
            f"{row.speed:,.0f} |"
        )
    lines += [
        "",
        _LEGEND,
        "",
        "| recipe | " + " | ".join(DOMAINS) + " |",
        "| --- |" + " --- |" * len(DOMAINS),
        *(f"| {row.recipe} | " + " | ".join(f"{row.domains[domain]:.3f}" for domain in DOMAINS) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Standing], path: Path) -> None:
    """Loss against active parameters, load balance, specialisation and speed. Needs matplotlib (:func:`can_draw`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    sides: dict[str, Sequence[float]] = {
        "active parameters per token": [row.active for row in rows],
        "MaxVio": [row.max_violation for row in rows],
        "specialisation, bits": [row.specialisation for row in rows],
        "tokens trained on per second of processor time": [row.speed for row in rows],
    }
    bits = [row.bits_per_byte for row in rows]
    reach = [[one.mean - one.low for one in bits], [one.high - one.mean for one in bits]]
    places: Any = figure.subplots(2, 2)
    for side, (label, values) in zip(places.flat, sides.items(), strict=True):
        side.errorbar(values, [one.mean for one in bits], yerr=reach, fmt="o", markersize=4, linewidth=0.6)
        for row, value in zip(rows, values, strict=True):
            side.annotate(
                row.recipe, (value, row.bits_per_byte.mean), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
        side.set(xlabel=label, ylabel="bits per byte")
    figure.savefig(path, dpi=140)


def can_draw() -> None:
    """OptionError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise OptionError("a picture needs matplotlib, which is not installed: pip install 'moekit[plot]'")
