"""MoGE (n 177): does choosing as many experts in every group keep devices equally busy, and at what price?

Setting, three parts. Drawn scores: batches of 16 tokens, 64 experts on 8 devices, top-8 against one per group, 2,000
batches a seed; IS = (busiest minus idlest device) / tokens. Trained: the protocol of ``_league``; ``moge`` (15 experts
in 3 groups, one of each, one shared) against ``ungrouped``, the same with plain top-3, and the base recipe, which has
as many parameters, active and in all; "straggling" is the load of the busiest group over the mean on the judge's text,
mean over layers. Converted: the embedded model (16 experts, top-4) made to choose one of each of 4 groups without
training, groups being neighbours, or experts that are seldom chosen together (swaps from neighbours while the number
of joint choices inside groups falls, counted on calibration text).

Rule, written before the first run. `shown` if and only if all of these hold:

1. Top-8 leaves some imbalance in 99 % of the drawn batches or more, in every seed, and MoGE in none.
2. The 95 % t interval over seeds of straggling, ungrouped minus moge, lies above zero.
3. The interval of (moge minus ungrouped) in bits per byte does not lie above zero.

The conversion is reported and decides nothing. Points 1 and 2 check the code more than the claim: one of each group
loads groups equally by construction, and nothing is more even. What could fail is point 3, the price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit import lab
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.contract import Context, RouterEdit
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table
from moekit.measure import bits_per_byte
from moekit.nn import Site
from moekit.nn.selectors import Grouped, TopK
from moekit.stream import LoadedModel

MOGE, FREE = "moge", "ungrouped"
GROUPS, DEVICES, TOKENS, DRAWS, TEST_BYTES, CALIBRATION = 3, 8, 16, 2000, 2048, 4096
DRAWN = Site(hidden_size=1, intermediate_size=1, num_experts=64, top_k=8)


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return imbalance of drawn batches, losses and straggling of trained models, and what converting costs."""
    selectors: dict[str, Callable[..., Tensor]] = {"top-k": TopK(DRAWN), "grouped": Grouped(DRAWN, groups=DEVICES)}
    drawn = [{name: imbalance(select, seed) for name, select in selectors.items()} for seed in seeds]
    converted = conversions(seeds)
    arms = {BASE: contestant(), FREE: contestant("moge", router={"select": "top-k"}), MOGE: contestant("moge")}
    found = league(arms, seeds, advance)
    late = [{name: straggling(played[name]["load"]) for name in (FREE, MOGE)} for played in found]
    figures = table(found) | {
        "imbalanced_batches": means([{name: one[0] for name, one in each.items()} for each in drawn]),
        "mean_imbalance": means([{name: one[1] for name, one in each.items()} for each in drawn]),
        "straggling": means(late),
        "straggling_less": gap(late, FREE, MOGE),
        "moge_minus_ungrouped": lead(found, MOGE, FREE),
        "base_minus_moge": lead(found, BASE, MOGE),
        "converted": means(converted),
        "neighbours_minus_seldom_together": gap(converted, "neighbours", "seldom together"),
    }
    shown = holds(figures, drawn)
    return Outcome(shown=shown, figures=figures, setting=setting(arms) | {"drawn_batches": DRAWS})


def holds(figures: Mapping[str, Any], drawn: Sequence[Mapping[str, tuple[float, float]]]) -> bool:
    """The rule of the module's docstring; ``drawn`` is what :func:`imbalance` says, seed by seed."""
    return (
        all(each["top-k"][0] >= 0.99 and each["grouped"][0] == 0 for each in drawn)
        and figures["straggling_less"]["low"] > 0
        and figures["moge_minus_ungrouped"]["low"] <= 0
    )


def imbalance(select: Callable[..., Tensor], seed: int) -> tuple[float, float]:
    """(share of drawn batches whose devices are not equally loaded, mean IS)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(DRAWS * TOKENS, DRAWN.num_experts, generator=generator).softmax(-1)
    device = select(scores, Context()) // (DRAWN.num_experts // DEVICES)
    load = torch.nn.functional.one_hot(device.view(DRAWS, -1), DEVICES).sum(1)
    spread = (load.max(1).values - load.min(1).values).double() / TOKENS
    return float((spread > 0).double().mean()), float(spread.mean())


def straggling(loads: Sequence[Sequence[int]]) -> float:
    """The busiest group's load over the mean, mean over layers."""
    groups = [np.asarray(load).reshape(GROUPS, -1).sum(1) for load in loads]
    return float(np.mean([group.max() / group.mean() for group in groups]))


def conversions(seeds: Sequence[int]) -> list[dict[str, float]]:
    """Bits per byte of the embedded model by how its experts are grouped, seed by seed."""
    source = Checkpoint.open("moekit:mini")
    runner, tokenizer = LoadedModel.load(source, dtype=torch.float32), source.tokenizer()
    found = blocks(runner.model)

    def loss(texts: Mapping[str, list[str]]) -> float:
        scores = bits_per_byte(runner, texts, tokenizer, length=128, batch_size=16)
        return sum(score.mean for score in scores.values()) / len(scores)

    def texts(split: Any, size: int, seed: int) -> dict[str, list[str]]:
        return {domain: [lab.text(domain, split, size, seed)] for domain in lab.DOMAINS}

    played = []
    for seed in seeds:
        joint = [np.zeros((block.num_experts, block.num_experts)) for block in found]
        with ExitStack() as stack:
            for block, count in zip(found, joint, strict=True):
                stack.enter_context(block.observe(counter(count)))
            loss(texts("train", CALIBRATION, seed))
        groups = {
            "whole": None,
            "neighbours": [neighbours(block.num_experts, block.top_k) for block in found],
            "seldom together": [apart(count, block.top_k) for block, count in zip(found, joint, strict=True)],
        }
        one = {}
        for name, labels in groups.items():
            with ExitStack() as stack:
                for block, label in zip(found, labels or (), strict=False):
                    stack.enter_context(block.edit(RouterEdit(after_score=one_of_each(label))))
                one[name] = loss(texts("test", TEST_BYTES, seed))
        played.append(one)
    return played


def counter(count_EE: np.ndarray) -> Callable[[Any], None]:
    """Adds how often two experts were chosen together."""

    def add(seen: Any) -> None:
        chosen = seen.routing.dense(len(count_EE)).ne(0).double()
        count_EE[:] += (chosen.T @ chosen).cpu().numpy()

    return add


def one_of_each(label_E: np.ndarray) -> Callable[[Tensor, Context], Tensor]:
    """Leaves the highest logit of every group: top-k then takes one of each."""
    groups = [torch.as_tensor(np.flatnonzero(label_E == group)) for group in range(label_E.max() + 1)]

    def mask(logits_TE: Tensor, context: Context) -> Tensor:
        out = torch.full_like(logits_TE, -torch.inf)
        for group in groups:
            best = group[logits_TE[:, group].argmax(1)][:, None]
            out.scatter_(1, best, logits_TE.gather(1, best))
        return out

    return mask


def neighbours(experts: int, groups: int) -> np.ndarray:
    """Labels of equal groups of neighbours."""
    return np.repeat(np.arange(groups), experts // groups)


def apart(count_EE: np.ndarray, groups: int) -> np.ndarray:
    """Labels of equal groups with few joint choices inside: the best swap of two experts, as long as one helps."""
    label = neighbours(len(count_EE), groups)
    off = count_EE - np.diag(np.diag(count_EE))

    def inside(labels: np.ndarray) -> float:
        return float(off[labels[:, None] == labels[None]].sum())

    while True:
        swaps = [(a, b) for a, b in product(range(len(label)), repeat=2) if a < b and label[a] != label[b]]
        tried = [swapped(label, a, b) for a, b in swaps]
        best = min(tried, key=inside)
        if inside(best) >= inside(label):
            return label
        label = best


def swapped(label_E: np.ndarray, a: int, b: int) -> np.ndarray:
    other = label_E.copy()
    other[[a, b]] = other[[b, a]]
    return other
