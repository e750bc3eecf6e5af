"""Loss-free balancing as a primal-dual method (n 96): do its properties hold where its assumptions do?

Setting, numbers only: scores of T = 4,096 tokens and 16 experts, sigmoids of normal numbers with an offset of deviation
1 for each expert; top-2 of score + bias; biases moved by `nn.Correction`, 600 times on the same scores. Steps: signs
with u = 2e-3, relative errors with u = 5e-3 (small) and 0.5 (large). The Lagrangian is sum of the chosen (score + bias)
minus L times the sum of biases, per token; at a choice of top-2 it is the dual function. Online: 16 new tokens a step,
4,096 steps, u constant, u / sqrt(n) and u / n; each u is the best of 0.03, 0.1, 0.3, 1 (mean gap at steps 2,048, 2,896
and 4,096) on another stream; the gap to the least expected dual value is measured on 131,072 other tokens. Regret of an
octave is the sum of gaps from N to 2N: its log2 grows by 0 an octave if regret is logarithmic, by 1/2 if it grows as
sqrt(N), by 1 if it is linear. Drift: offsets turn into others in a straight line over 1,024 steps of 512 tokens.

Rule, written before the first run. `shown` if and only if, for every seed:

1. No slot ever moves to an expert whose bias rose less than that of the one it left; with signs none moves to an
   overloaded expert or away from an underloaded one.
2. With small steps the Lagrangian never rises before MaxVio is below 0.05, and MaxVio ends below 0.02.

and, over the seeds, the 95 % t interval of the octaves' slope with u / n lies below 0.25. Regret that grows like a root
with u / n, or one token moved the wrong way, falsifies the claim. Drift (where 1 / n should lose) is reported only.

With scores that stay as they are, point 1's first half is an identity (a slot moves from j to i only where i's bias
rose more), so it checks the code. The sheet's own reading, that slots only go from overloaded to underloaded experts,
holds with signs and not with relative errors: of two overloaded experts the less loaded one gains on the other, small
steps or not (``moved_to_the_overloaded``).

Seeds 11 to 13 found all as claimed but for the width of one interval: octave slopes of 0.98 (constant), 0.39 (root) and
0.01 (1 / n) on average, the last within [-0.34, 0.36] on three seeds of one stream each; hence not shown. Ten fresh
seeds (21 to 30), decided upon before they were run, narrowed it to [-0.17, 0.07], and in one of them one token of 25
million moved between two overloaded experts whose biases fell alike and whose sums, 2e-8 apart, float32 rounded the
other way round. Fixed scores are iterated in float64 since, and what is recorded is of ten seeds more (31 to 40), the
rule as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.contract import Context
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._seeds import each_seed, over_seeds
from moekit.nn import Correction, Site, max_violation
from moekit.nn.selectors import TopK

TOKENS, EXPERTS, K, STEPS = 4096, 16, 2, 600
STREAM, ONLINE, JUDGE, DRIFT = 16, 4096, 2**17, 1024
RATES, COURSES = (0.03, 0.1, 0.3, 1.0), ("constant", "1/sqrt(n)", "1/n")
FIXED = {
    "signs": {"rate": 2e-3, "update": "sign"},
    "small": {"rate": 5e-3, "update": "proportional"},
    "large": {"rate": 0.5, "update": "proportional"},
}
_SELECT = TopK(Site(hidden_size=1, intermediate_size=1, num_experts=EXPERTS, top_k=K))


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return what moved, loads, Lagrangians, regret and drift. ``text`` is not used."""
    found = each_seed(seeds, advance, measure)
    figures = over_seeds(found)
    figures["holds_on_every_seed"] = all(kept(one) for one in found)
    setting = {"tokens": TOKENS, "experts": EXPERTS, "k": K, "steps": STEPS, "online_steps": ONLINE}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return bool(figures["holds_on_every_seed"] and figures["online"]["1/n"]["octave_slope"]["high"] < 0.25)


def kept(one: Mapping[str, Any]) -> bool:
    """The first two points of the rule, on one seed."""
    fixed, small = one["fixed"], one["fixed"]["small"]
    moved = all(run["moved_wrongly"] == 0 for run in fixed.values()) and fixed["signs"]["moved_to_the_overloaded"] == 0
    return bool(moved and small["lagrangian_rises"] == 0 and small["max_violation"] < 0.02)


def measure(seed: int) -> dict[str, Any]:
    """All figures of one seed."""
    draw = torch.Generator().manual_seed(seed)
    scores = sampled(draw, TOKENS, offsets(draw))
    return {
        "fixed": {name: iterated(scores, Correction(**options)) for name, options in FIXED.items()},
        "online": {course: online(seed, course) for course in COURSES},
        "drift": {course: drifting(seed, course) for course in COURSES},
    }


def offsets(draw: torch.Generator) -> Tensor:
    return torch.randn(EXPERTS, generator=draw)


def sampled(draw: torch.Generator, tokens: int, offset_E: Tensor) -> Tensor:
    """Scores [T, E]."""
    return (torch.randn(tokens, EXPERTS, generator=draw) + offset_E).sigmoid()


def chosen(scores_TE: Tensor, bias_E: Tensor) -> Tensor:
    """bool [T, E]."""
    expert = _SELECT(scores_TE, Context(), bias_E)
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, expert, True)


def lagrangian(scores_TE: Tensor, bias_E: Tensor) -> float:
    """Per token: the dual function at ``bias_E``, in float64."""
    total = (scores_TE.double() + bias_E.double()).topk(K, dim=1).values.sum()
    return float(total / len(scores_TE) - K / EXPERTS * bias_E.double().sum())


def iterated(scores_TE: Tensor, correction: Correction) -> dict[str, float]:
    """The same scores again and again, in float64: rounding must not order two experts anew."""
    scores_TE = scores_TE.double()
    bias = torch.zeros(EXPERTS, dtype=torch.float64)
    marks = chosen(scores_TE, bias)
    wrong, over, rises, balanced, value, worst = 0, 0, 0, False, lagrangian(scores_TE, bias), 0.0
    for step in range(STEPS):
        load, before = marks.sum(0), bias.clone()
        violation = max_violation(load)
        balanced = balanced or violation < 0.05
        worst = max(worst, violation) if step >= STEPS - 100 else worst
        correction.step(bias, load)
        after = chosen(scores_TE, bias)
        wrong += moved_wrongly(marks, after, bias - before)
        mean = load.float().mean()
        over += int((after & ~marks)[:, load > mean].sum() + (marks & ~after)[:, load < mean].sum())
        marks, new = after, lagrangian(scores_TE, bias)
        rises += int(new > value + 1e-9 and not balanced)
        value = new
    return {
        "moved_wrongly": float(wrong),
        "moved_to_the_overloaded": float(over),
        "lagrangian_rises": float(rises),
        "max_violation": max_violation(marks.sum(0)),
        "worst_of_last_100": worst,
    }


def moved_wrongly(before: Tensor, after: Tensor, rise_E: Tensor) -> int:
    """Tokens that gained an expert whose bias rose less than that of one they lost."""
    gained = torch.where(after & ~before, rise_E, torch.inf).amin(1)
    lost = torch.where(before & ~after, rise_E, -torch.inf).amax(1)
    return int((gained < lost - 1e-7).sum())


def streamed(draw: torch.Generator, offset_E: Tensor, course: str, rate: float, at: Sequence[int]) -> list[Tensor]:
    """Biases after so many steps on a stream of new tokens."""
    correction = Correction(rate=rate, update="proportional", course=course)
    bias, seen, wanted = torch.zeros(EXPERTS), [], set(at)
    for step in range(1, max(at) + 1):
        correction.step(bias, chosen(sampled(draw, STREAM, offset_E), bias).sum(0))
        if step in wanted:
            seen.append(bias.clone())
    return seen


def online(seed: int, course: str) -> dict[str, float]:
    """Gaps to the least dual value along a stream, with the rate that did best on another."""
    draw = torch.Generator().manual_seed(seed + 1)
    offset, last = offsets(draw), ONLINE.bit_length() - 1
    points = sorted({round(2 ** (i / 6)) for i in range(6 * 6, 6 * last + 1)})
    judge = sampled(draw, JUDGE, offset)
    least = lagrangian(judge, optimal(judge))
    late = (ONLINE // 2, round(ONLINE / 2**0.5), ONLINE)

    def gaps(rate: float, stream: int, at: Sequence[int]) -> np.ndarray:
        biases = streamed(torch.Generator().manual_seed(stream), offset, course, rate, at)
        return np.array([lagrangian(judge, bias) - least for bias in biases])

    rate = min(RATES, key=lambda rate: float(gaps(rate, seed + 2, late).mean()))
    found = gaps(rate, seed + 3, points)
    octave = np.floor(np.log2(np.array(points[:-1]))).astype(int)
    width = np.diff(points)
    regret = np.array([(found[:-1] * width)[octave == o].sum() for o in np.unique(octave)])
    slope = np.polyfit(np.arange(len(regret)), np.log2(np.maximum(regret, 1e-12)), 1)[0]
    return {"rate": rate, "octave_slope": float(slope), "regret": float(regret.sum()), "last_gap": float(found[-1])}


def optimal(scores_TE: Tensor) -> Tensor:
    """Biases of least dual value on fixed scores: relative steps until nothing changes much, then smaller ones."""
    bias = torch.zeros(EXPERTS)
    for rate in (0.3, 0.1, 0.03):
        correction = Correction(rate=rate, update="proportional")
        for _ in range(25):
            correction.step(bias, chosen(scores_TE, bias).sum(0))
    return bias


def drifting(seed: int, course: str) -> dict[str, float]:
    """Mean MaxVio of the last half of a stream whose offsets turn into others."""
    draw = torch.Generator().manual_seed(seed + 4)
    first, last = offsets(draw), offsets(draw)
    correction = Correction(rate=0.1, update="proportional", course=course)
    bias, found = torch.zeros(EXPERTS), []
    for step in range(DRIFT):
        offset = first + (last - first) * step / DRIFT
        load = chosen(sampled(draw, 32 * STREAM, offset), bias).sum(0)
        found.append(max_violation(load))
        correction.step(bias, load)
    return {"max_violation": float(np.mean(found[DRIFT // 2 :]))}
