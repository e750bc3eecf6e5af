"""UltraMemV2 (n 39): does a memory learn more facts than a dense layer of as much work, and read less than experts?

Setting: 4,096 facts, one answer out of 64 for each pair of 64 first and 64 second names; a name is a fixed random
vector of 24 numbers and a pair the two side by side, after one linear layer. One layer of a kind, then a linear
read-out; 1,500 steps of 256 facts at 3e-3 (AdamW). Contestants: ``memory`` (UltraMemV2: Tucker rank 2, 32 of 48^2 items
of width 16), ``dense`` (one feed-forward that uses as many parameters for a token as the memory, at least), ``experts``
(top-4 of 16 with load loss, at least as many parameters as the memory in all and for a token) and ``product keys`` (the
same table, with plain product keys, a softmax and GELU: PEER).

Counted: parameters a token uses are its multiplications and, once each, the numbers it reads. All keys are scored for
every token and so counted, and so are projections. Bytes touched are told for 1 token and for 256 different ones.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of the share of facts known
afterwards say: ``memory`` minus ``dense`` lies above zero, ``memory`` minus ``experts`` does not lie below zero, and
one token touches fewer bytes of ``memory`` than of ``experts``. A dense layer that does as well falsifies the claim.

The bytes follow from the sizes and were known before any training: `experts` was made as large as the memory in all,
and so reads 2.9 times as much for a token. At equal sizes (`experts alike`) a token reads as many bytes, 28,800 against
28,784, and only many tokens at once read fewer of the memory's.

Reported, deciding nothing, and added after the first run, in which ``experts`` used three times the memory's parameters
for a token: ``experts alike``, one of as many experts as give the memory's parameters both in all and for a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._seeds import differences, each_seed, over_seeds
from moekit.lab.experiments._toys import Batch, Toy, answers, fit, moe, parameters
from moekit.nn import FeedForward, MoekitConfig, Site
from moekit.nn.rank_one import Memory

NAMES, ANSWERS, SIZE, STEPS, BATCH, RATE = 64, 64, 48, 1500, 256, 3e-3
KEYS, TOP, KEY, WIDTH = 48, 32, 12, 16
EXPERTS, SLOTS = 16, 4
TABLE: dict[str, Any] = {"keys": KEYS, "top": TOP, "key": KEY, "width": WIDTH}
ARMS = ("memory", "product keys", "dense", "experts", "experts alike")


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return the share of facts known, parameters and bytes by contestant. ``text`` is not used."""
    found = each_seed(seeds, advance, lambda seed: {"known": {name: known(name, seed) for name in ARMS}})
    pairs = {"memory - dense": ("known", "memory", "dense"), "memory - experts": ("known", "memory", "experts")}
    figures = over_seeds(found) | {"sizes": {name: sizes(layer(name)) for name in ARMS}}
    figures["rule"] = differences(found, pairs)
    setting = {"facts": NAMES * NAMES, "steps": STEPS, "batch": BATCH, "size": SIZE}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    touched = {name: one["bytes of one token"] for name, one in figures["sizes"].items()}
    rule = figures["rule"]
    return (
        rule["memory - dense"]["low"] > 0
        and rule["memory - experts"]["high"] >= 0
        and touched["memory"] < touched["experts"]
    )


def layer(name: str) -> nn.Module:
    """One layer, its weights drawn from torch's generator."""
    config = MoekitConfig(hidden_size=SIZE, intermediate_size=4 * SIZE, num_hidden_layers=1)
    raw: dict[str, Any] = {"rank": 2, "activation": "none", "weigh": "raw"} if name != "product keys" else {}
    memory = Memory(config, 0, **TABLE, **raw)
    for module in memory.modules():
        if hasattr(module, "initialise"):
            module.initialise(0.02)
    if name in ("memory", "product keys"):
        return memory
    work = memory.active_parameters()
    if name == "dense":
        return FeedForward(SIZE, -(-work // (3 * SIZE)))
    number, slots = EXPERTS, SLOTS
    # as wide as total or active parameters ask for, whichever is more
    width = max(-(-work // (3 * SIZE * SLOTS)), -(-parameters(memory) // (3 * SIZE * EXPERTS)))
    if name == "experts alike":
        number, slots, width = alike(parameters(memory), work)
    site = Site(hidden_size=SIZE, intermediate_size=width, num_experts=number, top_k=slots)
    router = {"weigh": {"kind": "scores", "normalise": slots > 1}}  # a weight of 1 would teach a top-1 router nothing
    return moe(site, router, balance={"load": 0.01})


def alike(total: int, active: int) -> tuple[int, int, int]:
    """(experts, 1, width) of the fewest experts, each with its row of the router, that make up both sizes."""
    tried = ((number, 1, -(-(active - SIZE * number) // (3 * SIZE))) for number in itertools.count(1))
    return next(one for one in tried if one[0] * (3 * one[2] + 1) * SIZE >= total)


def sizes(one: nn.Module) -> dict[str, float]:
    """Parameters, those a token uses, and bytes of weights that 1 and 256 tokens of random facts touch (float32)."""
    total = parameters(one)
    x = torch.randn(256, SIZE, generator=torch.Generator().manual_seed(0))
    if isinstance(one, Memory):
        row = 2 * WIDTH
        fixed = total - 2 * one.value.numel()
        with torch.no_grad():
            distinct = len(one.find(x)[0].unique())
        active, many = one.active_parameters(), fixed + distinct * row
    elif isinstance(one, FeedForward):
        active = many = total
    else:
        number, slots = one.gate.num_experts, one.gate.top_k
        router = number * SIZE
        active, many = router + (total - router) * slots // number, total
    return {"total": total, "active": active, "bytes of one token": 4 * active, "bytes of 256 tokens": 4 * many}


def known(name: str, seed: int) -> float:
    """The share of the facts that are answered rightly after training."""
    generator = torch.Generator().manual_seed(seed)
    names = torch.randn(2, NAMES, SIZE // 2, generator=generator)
    answer = torch.randint(0, ANSWERS, (NAMES * NAMES,), generator=generator)
    pair = torch.cartesian_prod(torch.arange(NAMES), torch.arange(NAMES))
    asked = torch.cat((names[0][pair[:, 0]], names[1][pair[:, 1]]), dim=1)
    torch.manual_seed(seed)
    model = Toy(SIZE, SIZE, ANSWERS, [layer(name)])

    def batch(step: int) -> Batch:
        which = torch.randint(0, len(answer), (BATCH,), generator=generator)
        return asked[which], answer[which], {}

    fit(model, batch, STEPS, RATE, nn.functional.cross_entropy)
    return right(answers(model, asked)[0], answer)


def right(logits: Tensor, answer: Tensor) -> float:
    return (logits.argmax(1) == answer).float().mean().item()
