"""What experiments on training apart share: a small model, each worker's own batches, and runs in real processes.

Every contestant of a seed begins with the same weights; the workers of one contestant see the same batches as those of
another, and one process that stands for all of them sees the rows of all of them in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moekit.lab._batches import Batches as Mixture
from moekit.lab._batches import text_tokens
from moekit.lab._recipe import RECIPES
from moekit.lab.experiments._building import Ground
from moekit.lab.texts import TEXTS
from moekit.parallel._outer_apart import apart
from moekit.parallel._outer_link import Link, SlowLink
from moekit.parallel.spes import Spes
from moekit.parallel.streaming_diloco import StreamingDiLoCo
from moekit.train import Batch, Batches, Objective, TrainOptions, distil

SIZES: dict[str, Any] = {"hidden_size": 96, "num_layers": 4, "num_experts": 8, "top_k": 2, "intermediate_size": 48}
LENGTH, RATE, BALANCE = 128, 3e-3, 0.005
DOMAINS = tuple(RECIPES["dense"].phases[0].mixture)


@dataclass(frozen=True)
class Work:
    """How many ``workers`` train how many ``steps`` on how many ``tokens`` each; ``own`` gives each its own domains."""

    workers: int
    steps: int
    tokens: int
    own: tuple[tuple[str, ...], ...] = ()

    @property
    def setting(self) -> dict[str, Any]:
        """For the record."""
        return {
            "sizes": SIZES,
            "workers": self.workers,
            "steps": self.steps,
            "tokens_per_step_and_worker": self.tokens,
            "context": LENGTH,
        }

    def batches(self, seed: int, worker: int) -> Batches:
        """Drawn from the embedded models' last mixture, or from the worker's domains of it in the same proportions."""
        mixture = RECIPES["dense"].phases[0].mixture
        own = self.own[worker] if self.own else tuple(mixture)
        return draws(seed * 101 + worker, self.tokens, {name: mixture[name] for name in own})

    def all_batches(self, seed: int, workers: Sequence[int]) -> Batches:
        """The rows of several workers in one batch."""
        each = [self.batches(seed, worker) for worker in workers]

        def batch(step: int) -> Batch:
            found = [one(step) for one in each]
            return {name: torch.cat([part[name] for part in found]) for name in found[0]}

        return batch


@cache
def _text(domain: str) -> np.ndarray:
    return text_tokens(domain, "train")


@dataclass(frozen=True)
class _Mixture(Mixture):
    """Reads the texts once per process, however many draw from them."""

    @cached_property
    def _tokens(self) -> dict[str, np.ndarray]:
        return {domain: _text(domain) for domain in TEXTS if domain in self.recipe.phases[0].mixture}


def draws(seed: int, tokens: int, mixture: Mapping[str, float]) -> Batches:
    """Batches of so many tokens, rows of one domain each; answers weigh more than prompts, as in the mini model."""
    recipe = replace(
        RECIPES["dense"],
        seed=seed,
        tokens_per_step=tokens,
        context=LENGTH,
        long_share=0.0,
        phases=(replace(RECIPES["dense"].phases[0], mixture=dict(mixture)),),
    )
    source = _Mixture(recipe)

    def batch(step: int) -> Batch:
        ids, weight = source.batch(step)
        return {"input_ids": ids, "weight": weight}

    return batch


@cache
def ground() -> Ground:
    """What judges, once per process."""
    return Ground()


def fresh(seed: int) -> Any:
    """A small stock model from nothing."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(replace(RECIPES["moe"], **SIZES).config(), dtype=torch.float32)


def fit(model: Any, batches: Batches, work: Work, seed: int, **more: Any) -> None:
    """Train in place, in this process alone."""
    options = TrainOptions(steps=work.steps, learning_rate=RATE, course="cosine", weight_decay=0.1, seed=seed)
    with apart():
        distil(model, None, batches, options, Objective(kl=0.0, lm=1.0, balance=BALANCE), **more)


def central(work: Work, seed: int, workers: Sequence[int]) -> float:
    """Bits per byte of one process on the rows of these workers."""
    model = fresh(seed)
    fit(model, work.all_batches(seed, workers), work, seed)
    return ground().loss(model, seed)


def dealt(rank: int, world: int, tasks: Sequence[tuple[str, Work, int, tuple[int, ...]]]) -> dict[str, float]:
    """Every ``world``-th of the tasks (name, work, seed, workers), each by :func:`central`."""
    return {f"{name} {seed}": central(work, seed, who) for name, work, seed, who in tasks[rank::world]}


def deal(tasks: Sequence[tuple[str, Work, int, tuple[int, ...]]]) -> dict[str, float]:
    """As :func:`dealt`, run by every process of the default group."""
    link = Link()
    return dealt(link.rank, link.world, tasks)


def apart_run(row: StreamingDiLoCo | Spes, work: Work, seed: int, slow: SlowLink | None = None) -> dict[str, Any]:
    """One contestant, run by every process of the default group at once.

    ``loss`` in bits per byte, of the one model that all end with (judged by the first worker alone); what was
    exchanged; ``numbers`` in the model and its ``experts``, ``trained`` of them by this worker; ``seconds`` not waited.
    """
    link, model = Link(timeout=300.0, slow=slow), fresh(seed)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sync = row.attach(model, link)
    trained = sum(p.numel() for p in model.parameters())
    start = time.monotonic()
    fit(model, work.batches(seed, link.rank), work, seed, after_step=sync)
    seconds = time.monotonic() - start - link.traffic.stalled
    sync.finish(work.steps)
    traffic = vars(link.traffic).copy()
    loss = ground().loss(model, seed) if link.rank == 0 and slow is None else None
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    counts = {"numbers": sum(sizes.values()), "experts": experts, "trained": trained}
    return {"loss": loss, "traffic": traffic, "seconds": seconds, **counts}


def named(found: Mapping[str, float], seeds: Sequence[int]) -> list[dict[str, float]]:
    """From "name seed" -> loss to one table of names per seed."""
    names = dict.fromkeys(key.rpartition(" ")[0] for key in found)
    return [{name: found[f"{name} {seed}"] for name in names} for seed in seeds]
