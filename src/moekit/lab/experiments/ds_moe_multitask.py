"""DeepSpeed MoE for many tasks (n 75): random token selection, experts of two models in one, pruning by use.

Setting: small stock models (4 layers, hidden size 96, 8 experts of 48 unless said, top-2) from nothing on the embedded
models' mixture, 512 tokens a step, judged in bits per byte on the test split, mean over all domains, without any
capacity. `in order` and `at random`: 120 steps at capacity factor 0.5, the usual rule and random token selection; with
them the bias of position: the share of 4,000 batches of 64 tokens for one expert of capacity 32 in which each position
is kept. Aggregation: two models of 4 experts, each 120 steps on batches of its own, become one of 8 (`aggregated`), 80
steps more; `scratch, same additional`: 8 experts from nothing for 80 steps; `scratch, same total`: for 320, which is
what both parents and the rest cost. Pruning: the model of 320 steps loses 4 experts a layer, those least used on 4 KB
of calibration text (`by use`) or random ones (`by lot`), and is trained for 30 steps more. Groups: gradients of a model
on 4 real processes (gloo) in groups of 2 against one process, in float64.

Rule, written before the first run. `shown` if and only if all of these hold:

1. Kept at random, no position's share is off its expectation by more than chance allows (chi-square over positions
   below its 99.9 % quantile), while the usual rule keeps the first 32 always and the others never.
2. The 95 % t intervals over seeds of (in order minus at random), (scratch, same additional minus aggregated) and (by
   lot minus by use) lie above zero.
3. No gradient is off by more than 1e-6 of the largest.

`scratch, same total` minus `aggregated` is reported beside them and decides nothing: it says whether the two parents
were worth their own steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit.blocks import Observation, blocks, select_experts
from moekit.contract import PAD
from moekit.lab._recipe import RECIPES
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._outer_training import BALANCE, LENGTH, RATE, draws, ground
from moekit.lab.experiments._spread import PATIENCE, grouped
from moekit.parallel import LocalRanks
from moekit.parallel._capacity import kept
from moekit.parallel.ds_moe_multitask import RandomTokens, aggregate
from moekit.train import Objective, TrainOptions, distil

SIZES: dict[str, Any] = {"hidden_size": 96, "num_layers": 4, "top_k": 2, "intermediate_size": 48}
EXPERTS, TOKENS, FACTOR, DRAWS, WIDE, ROOM = 8, 512, 0.5, 4000, 64, 32
STEPS = {"parent": 120, "more": 80, "dropping": 120, "tuning": 30}
CALIBRATION_ROWS, TOLERANCE = 32, 1e-6
PAIRS = (
    ("in order", "at random"),
    ("scratch, same additional", "aggregated"),
    ("scratch, same total", "aggregated"),
    ("by lot", "by use"),
)


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return bits per byte by contestant, bias by position, and gaps of gradients. ``text`` is not used."""
    found = []
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        found.append({**dropped(seed), **joined(seed)})
    with LocalRanks(4, patience=PATIENCE) as ranks:
        gradients = max(max(answer.values()) for answer in ranks.ask(grouped, 2))
    figures = {
        "bits_per_byte": means(found),
        "gap": {f"{worse} minus {better}": gap(found, worse, better) for worse, better in PAIRS},
        "positions": positions(seeds[0]),
        "gradients": gradients,
    }
    setting = {"sizes": SIZES, "experts": EXPERTS, "steps": STEPS, "tokens_per_step": TOKENS, "context": LENGTH}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    place, gaps = figures["positions"], figures["gap"]
    even = place["chi_square"] < place["chi_square_limit"] and place["in_order_is_a_step"]
    better = all(gaps[f"{a} minus {b}"]["low"] > 0 for a, b in PAIRS if a != "scratch, same total")
    return bool(even and better and figures["gradients"] <= TOLERANCE)


def positions(seed: int) -> dict[str, Any]:
    """How often each position is kept where all tokens want one expert."""
    draw, expert = torch.Generator().manual_seed(seed), torch.zeros(WIDE, 1, dtype=torch.int64)
    counts = torch.zeros(WIDE, dtype=torch.float64)
    for _ in range(DRAWS):
        counts += (kept(expert, 1, ROOM, draw)[:, 0] != PAD).double()
    wanted = DRAWS * ROOM / WIDE
    # Sampling without replacement shrinks each position's variance by (1 - C / T), and the sum has T - 1 degrees.
    statistic = float(((counts - wanted) ** 2).sum() / (wanted * (1 - ROOM / WIDE)) * (WIDE - 1) / WIDE)
    order = (kept(expert, 1, ROOM)[:, 0] != PAD).tolist()
    return {
        "chi_square": statistic,
        "chi_square_limit": float(chi2.ppf(0.999, WIDE - 1)),
        "least_and_most_kept": [float(counts.min()) / DRAWS, float(counts.max()) / DRAWS],
        "in_order_is_a_step": order == [True] * ROOM + [False] * (WIDE - ROOM),
    }


def dropped(seed: int) -> dict[str, float]:
    """Bits per byte of two models trained at a low capacity."""
    found = {}
    for name, random in (("in order", False), ("at random", True)):
        model = fresh(EXPERTS, seed)
        with RandomTokens(factor=FACTOR, random=random, seed=seed).during(model):
            fit(model, seed, STEPS["dropping"])
        found[name] = ground().loss(model.eval(), seed)
    return found


def joined(seed: int) -> dict[str, float]:
    """Bits per byte of what comes of two parents, of models from nothing, and of pruned ones."""
    parents = [fit(fresh(EXPERTS // 2, seed + at), seed + 1000 * (at + 1), STEPS["parent"]) for at in range(2)]
    total = 2 * STEPS["parent"] + STEPS["more"]
    large = fit(fresh(EXPERTS, seed), seed, total)
    models = {
        "aggregated": fit(aggregate(parents), seed, STEPS["more"]),
        "scratch, same additional": fit(fresh(EXPERTS, seed), seed, STEPS["more"]),
        "scratch, same total": large,
        "by use": fit(pruned(large, by_use(large, seed)), seed + 5000, STEPS["tuning"]),
        "by lot": fit(pruned(large, by_lot(seed)), seed + 5000, STEPS["tuning"]),
    }
    return {name: ground().loss(model, seed) for name, model in models.items()}


def fresh(experts: int, seed: int) -> Any:
    """A small stock model from nothing, in training mode."""
    torch.manual_seed(seed)
    config = replace(RECIPES["moe"], num_experts=experts, **SIZES).config()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def fit(model: Any, seed: int, steps: int) -> Any:
    """Train on the mixture; evaluation mode afterwards."""
    options = TrainOptions(steps=steps, learning_rate=RATE, course="cosine", weight_decay=0.1, seed=seed)
    batches = draws(seed, TOKENS, RECIPES["dense"].phases[0].mixture)
    distil(model.train(), None, batches, options, Objective(kl=0.0, lm=1.0, balance=BALANCE))
    return model.eval()


def pruned(model: Any, keep: Callable[[str], list[int]]) -> Any:
    """A copy that keeps the named experts of every block."""
    made = copy.deepcopy(model)
    select_experts(made, {block.name: keep(block.name) for block in blocks(made)})
    return made


def by_use(model: Any, seed: int) -> Callable[[str], list[int]]:
    """The half of the experts of each block that calibration text uses most; ties go to the lower id."""
    counts: dict[str, Tensor] = {}

    def count(seen: Observation) -> None:
        name = seen.block.name
        counts[name] = counts.get(name, torch.zeros(EXPERTS, dtype=torch.int64)) + seen.routing.counts(EXPERTS)

    rows = torch.stack(ground().rows(seed, CALIBRATION_ROWS))[:, :LENGTH]
    with ExitStack() as stack, torch.no_grad():
        for block in blocks(model):
            stack.enter_context(block.observe(count))
        model(input_ids=rows, use_cache=False)
    half = EXPERTS // 2
    return lambda name: sorted(counts[name].argsort(descending=True, stable=True)[:half].tolist())


def by_lot(seed: int) -> Callable[[str], list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return lambda name: sorted(torch.randperm(EXPERTS, generator=draw)[: EXPERTS // 2].tolist())
