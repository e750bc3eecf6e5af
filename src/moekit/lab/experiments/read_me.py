"""Read-ME (n 25): do experts cut along domains and one choice per token beat random cuts and a pruned dense layer?

Setting: the dense sibling; four domains (the texts), 4 rows of 128 tokens of each to rank hidden units on, the top half
of every layer per domain. Training: 512 tokens a step, 128 of each domain, two rounds of 20 router steps (L_RD, 3e-3)
and 20 steps of everything else (text, 1e-3, then 0.8 of it), cosine within a round. Contestants of a seed have equal
active width, the same batches and as many steps on text:

- read-me: as above;
- random: the same, with the units of each layer permuted before the masks are applied, so that sizes and overlaps stay;
- pruned: one dense model of the better half of each layer's units over all domains, trained on text alone.

Judged in bits per byte on 2 KiB of held-out text per domain. Read-me with the true domain in the router's place is
reported, and how often the router chooses it. System: the router's choices for 128 held-out tokens of each domain, as
they would arrive in turn; batches of 8 by expert or in order of arrival, 8 layers, a cache of half of all experts.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of three differences lie
above zero: pruned minus read-me, random minus read-me (both bits per byte), and experts per batch in order of arrival
minus by expert. A random cut that does as well falsifies the claim. Belady's misses are a bound, printed, not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moekit import lab
from moekit.build._dense import DenseFFN, dense_layers
from moekit.build._split import replace_layer
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import ELSEWHERE, LM, Ground, keep_units, one_domain
from moekit.lab.experiments._caching import gap
from moekit.lab.experiments._seeds import each_seed, over_seeds
from moekit.measure import bits_per_byte
from moekit.run._batches import expert_batches
from moekit.run.policy import policy
from moekit.run.read_me import (
    AlignedFFN,
    PreRouter,
    Routed,
    distinct,
    hidden,
    importance,
    in_order,
    queue,
    routing_distillation,
    served,
    top_half,
)
from moekit.run.replay import replay
from moekit.stream import LoadedModel
from moekit.train import Batch, TrainOptions, distil, train

DOMAINS, ROWS, LENGTH, ROUNDS, STEPS = lab.TEXTS, 4, 128, 2, 20
ROUTER_RATE, RATE, FADE, TEST_BYTES, BATCH = 3e-3, 1e-3, 0.8, 2048, 8


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return bits per byte by contestant, what the router chose, batches and misses. ``text`` is not used."""
    ground = Ground()
    found = each_seed(seeds, advance, lambda seed: measure(ground, seed))
    figures = summary(found)
    setting = {"model": "moekit:dense", "fingerprint": ground.source.fingerprint, "domains": list(DOMAINS)}
    more = {"rounds": ROUNDS, "steps": STEPS, "tokens_per_step": LENGTH * len(DOMAINS)}
    return Outcome(shown=holds(figures), figures=figures, setting={**setting, **more})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    return all(one["low"] > 0 for one in figures["rule"].values())


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bits = {name: [one["bits per byte"][name] for one in found] for name in found[0]["bits per byte"]}
    experts = {name: [one["experts per batch"][name] for one in found] for name in found[0]["experts per batch"]}
    rule = {
        "pruned - read-me": gap(bits["pruned"], bits["read-me"]),
        "random - read-me": gap(bits["random"], bits["read-me"]),
        "in order - by expert": gap(experts["in order"], experts["by expert"]),
    }
    return {**over_seeds(found), "rule": rule}


def measure(ground: Ground, seed: int) -> dict[str, Any]:
    """Figures of one seed."""
    dense = ground.dense()
    modules = [ffn.module for ffn in dense_layers(dense)]
    parts = [one_domain(domain, seed, LENGTH, LENGTH) for domain in DOMAINS]
    ranked = [importance(dense, modules, calibration(domain, seed)) for domain in DOMAINS]
    score = [torch.stack(one) for one in zip(*ranked, strict=True)]  # by layer, [N, I]
    masks = [top_half(score_NI) for score_NI in score]
    draw = torch.Generator().manual_seed(seed)
    shuffled = [mask[:, torch.randperm(mask.shape[1], generator=draw)] for mask in masks]

    def batches(step: int) -> Batch:
        return {"input_ids": torch.cat([part(step)["input_ids"] for part in parts])}

    figures: dict[str, Any] = {"bits per byte": {"whole": loss(ground, dense, seed)}}
    bits = figures["bits per byte"]
    pruned = ground.dense()
    for ffn, score_NI in zip(dense_layers(pruned), score, strict=True):
        keep_units(ffn, top_half(score_NI.mean(0)).nonzero()[:, 0])
    for at in range(ROUNDS):
        on_text(pruned, at, seed, batches)
    bits["pruned"] = loss(ground, pruned, seed)
    for name, cut in (("random", shuffled), ("read-me", masks)):
        model, layers, router = refactored(ground, cut, seed)
        with Routed(model, layers, router):
            for at in range(ROUNDS):
                on_routing(model, router, dense, modules, cut, at, seed, batches)
                on_text(model, at, seed, batches)
            bits[name] = loss(ground, model, seed)
        if name == "read-me":
            bits["read-me, true domain"] = loss(ground, model, seed, layers)
            figures |= system(router, seed)
    figures["shared of units"] = float(torch.stack([mask.all(0).float().mean() for mask in masks]).mean())
    return figures


def calibration(domain: str, seed: int) -> list[Tensor]:
    batches = one_domain(domain, seed + ELSEWHERE, ROWS * LENGTH, LENGTH)
    return list(batches(0)["input_ids"][:, :LENGTH])


def refactored(ground: Ground, masks: Sequence[Tensor], seed: int) -> tuple[Any, list[AlignedFFN], PreRouter]:
    """A copy of the dense model with its layers cut, and a fresh router."""
    model, layers = ground.dense(), list[AlignedFFN]()
    found: list[DenseFFN] = dense_layers(model)
    for ffn, mask_NI in zip(found, masks, strict=True):
        layers.append(AlignedFFN(ffn.module, mask_NI))
        replace_layer(model, ffn.name, layers[-1])
    return model, layers, PreRouter(model.config.vocab_size, len(DOMAINS), seed=seed)


def on_text(model: Any, at: int, seed: int, batches: Callable[[int], Batch]) -> None:
    """The steps of one round on text: everything but the router."""
    options = TrainOptions(steps=STEPS, learning_rate=RATE * FADE**at, course="cosine", seed=seed)
    distil(model, None, lambda step: batches(at * STEPS + step), options, LM, what=["model.*"])


def on_routing(
    model: Any,
    router: PreRouter,
    dense: Any,
    modules: Sequence[Any],
    masks: Sequence[Tensor],
    at: int,
    seed: int,
    batches: Callable[[int], Batch],
) -> None:
    """The router's steps of one round; targets are the dense model's own units."""

    def loss(_: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            own = hidden(dense, modules, batch["input_ids"])
        return routing_distillation(router(batch["input_ids"]).flatten(0, 1), own, masks), {}

    options = TrainOptions(steps=STEPS, learning_rate=ROUTER_RATE * FADE**at, course="cosine", seed=seed)
    train(model, loss, lambda step: batches(at * STEPS + step), options, what=["pre_router.*"])


def loss(ground: Ground, model: Any, seed: int, layers: Sequence[AlignedFFN] = ()) -> float:
    """Bits per byte of held-out text, mean over domains; ``layers``, if given, all run the domain's own expert."""
    total = 0.0
    for index, domain in enumerate(DOMAINS):
        text = {domain: [lab.text(domain, "test", TEST_BYTES, seed)]}
        with ExitStack() as stack:
            for layer in layers:
                hook = layer.register_forward_pre_hook(lambda module, args, index=index: routed(module, args, index))
                stack.callback(hook.remove)
            scores = bits_per_byte(LoadedModel(model), text, ground.tokenizer, length=LENGTH, batch_size=16)
        total += scores[domain].mean
    return total / len(DOMAINS)


def routed(module: AlignedFFN, args: tuple[Tensor, ...], index: int) -> None:
    module.route = torch.full((args[0][..., 0].numel(),), index)


@torch.no_grad()
def system(router: PreRouter, seed: int) -> dict[str, Any]:
    """What the router chooses for held-out tokens that arrive in turn, and what batches and caches make of it."""
    bytes_ = [torch.tensor(list(lab.text(domain, "test", LENGTH, seed).encode())[:LENGTH]) for domain in DOMAINS]
    length = min(map(len, bytes_))
    choice_DT = router(torch.stack([row[:length] for row in bytes_])).argmax(-1)
    truth_DT = torch.arange(len(DOMAINS))[:, None].expand_as(choice_DT)
    experts = choice_DT.T.flatten().tolist()  # one token of each domain after the other
    batches = {"in order": in_order(len(experts), BATCH), "by expert": expert_batches(experts, BATCH)}
    layers, room, misses = 8, 4 * len(DOMAINS), {}
    for name, own in batches.items():
        future = queue(experts, own, layers, len(DOMAINS))
        misses[name] = {rule: float(replay(future, policy(rule), room).misses) for rule in ("lru", "lfu", "arc")}
        misses[name]["belady"] = float(served(future, room).misses)
    return {
        "router chooses the domain": float((choice_DT == truth_DT).float().mean()),
        "experts per batch": {name: distinct(experts, own) for name, own in batches.items()},
        "misses": misses,
        "busiest expert": float(torch.bincount(choice_DT.flatten(), minlength=len(DOMAINS)).max() / len(experts)),
    }
