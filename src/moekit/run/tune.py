"""Measuring how a model is best paged: every policy, with and without reading ahead, on the user's own prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from moekit.errors import OptionError
from moekit.run._predictors_gate import NextGate
from moekit.run.answer import Cost, answer
from moekit.run.defaults import Choice
from moekit.run.paging import Paging, paging
from moekit.run.policy import policies, policy

Regime = Literal["cold", "warm", "rotating"]
REGIMES: tuple[Regime, ...] = ("cold", "warm", "rotating")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """What a choice took in one regime: seconds and bytes read per token computed, and its hit rate.

    ``cold``: every prompt starts with no expert in memory. ``warm``: the same prompt was answered just before.
    ``rotating``: the prompts follow one another.
    """

    choice: Choice
    regime: Regime
    seconds: float
    nbytes: float
    hit_rate: float


def choices(top_k: int) -> list[Choice]:
    """Every policy there is, without reading ahead and with a token's worth of experts."""
    return [Choice(name, ahead) for name in policies() for ahead in (0, top_k)]


def tune(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    new_tokens: int = 16,
    *,
    among: Sequence[Choice] | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Each choice in each regime, on ``prompts`` (ids [1, S]) with ``new_tokens`` greedy tokens after each.

    The model keeps the budget it was opened with; what paged it before is put back. Raises :class:`OptionError`
    without prompts.
    """
    if not prompts:
        raise OptionError("tuning needs prompts: give text with --text")
    served = paging(model)
    candidates = list(among or choices(served.blocks[0].top_k))
    before, measured = (served.store.policy, served.predictor, served.width), list[Measured]()
    try:
        for number, choice in enumerate(candidates):
            for at, regime in enumerate(REGIMES):
                if progress is not None:
                    progress(number * len(REGIMES) + at, len(candidates) * len(REGIMES))
                costs = _run(model, served, choice, regime, prompts, new_tokens)
                measured.append(_measured(choice, regime, costs))
    finally:
        served.store.clear(before[0])
        _, served.predictor, served.width = before
    return measured


def best(measured: Sequence[Measured]) -> Choice:
    """The choice with the fewest seconds per token, mean over the regimes; ties go to the one measured first."""
    total: dict[Choice, float] = {}
    for one in measured:
        total[one.choice] = total.get(one.choice, 0.0) + one.seconds
    return min(total, key=lambda choice: total[choice])


def use(model: PreTrainedModel, choice: Choice) -> None:
    """Page a model's experts as a choice says, from now on and from an empty cache."""
    served = paging(model)
    served.store.clear(policy(choice.policy))
    served.predictor = NextGate([block.choose for block in served.blocks]) if choice.ahead else None
    served.width = choice.ahead


@dataclass(frozen=True)
class Point:
    """Memory for experts, as a share of all of them and in bytes, and the speed it gave: tokens computed per second,
    the prompts one after the other, from an empty cache."""

    share: float
    nbytes: int
    speed: float
    hit_rate: float


def curve_of(
    model: PreTrainedModel, prompts: Sequence[Tensor], choice: Choice, shares: Sequence[float], new_tokens: int = 16
) -> list[Point]:
    """Speed at several sizes of the cache, none above the budget the model was opened with."""
    served, points = paging(model), list[Point]()
    budget = served.store.budget
    smallest = max(tier.unit for tier in served.store.layers)
    try:
        for share in shares:
            nbytes = max(smallest, int(share * served.expert_bytes))
            if nbytes > budget:
                continue
            served.store.resize(nbytes)
            one = _measured(choice, "rotating", _run(model, served, choice, "rotating", prompts, new_tokens))
            points.append(Point(share, nbytes, 1 / one.seconds, one.hit_rate))
    finally:
        served.store.resize(budget)
    return points


def _run(
    model: PreTrainedModel, served: Paging, choice: Choice, regime: Regime, prompts: Sequence[Tensor], new_tokens: int
) -> list[Cost]:
    use(model, choice)
    costs = list[Cost]()
    for prompt in [prompts[0], prompts[0]] if regime == "warm" else prompts:
        if regime == "cold":
            served.store.clear(policy(choice.policy))
        costs.append(answer(model, prompt, new_tokens)[1])
    return costs[1:] if regime == "warm" else costs


def _measured(choice: Choice, regime: Regime, costs: Sequence[Cost]) -> Measured:
    tokens = sum(cost.prompt_tokens + cost.new_tokens - 1 for cost in costs)
    read = sum(cost.counters.demand_bytes + cost.counters.prefetch_bytes for cost in costs)
    requests = sum(cost.counters.requests for cost in costs)
    hits = sum(cost.counters.hits for cost in costs)
    seconds = sum(cost.first + cost.rest for cost in costs)
    return Measured(choice, regime, seconds / tokens, read / tokens, hits / max(requests, 1))
