"""The one protocol of all language-model rows of the building wing: same data, sizes, steps, seeds and judge.

A contestant is a recipe (``moekit.recipes``, or a variant of one). Of one seed all begin from that seed, see the same
batches in the same order (1,024 bytes a step, 600 steps, four domains in equal parts, rows of one domain) and are
judged on the same unseen text, in bits per byte, mean over the domains. Parameters and what a token uses of them are
counted on the judge's text. A contestant that was trained before by the same protocol is taken from the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from moekit import lab
from moekit.lab._evaluate import mutual_information
from moekit.lab.experiments import Advance
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._outer_training import draws
from moekit.nn import MoE, max_violation
from moekit.nn.experts import Experts
from moekit.train import Batch, Batches
from moekit.train.loop import Record
from moekit.train.recipe import Recipe, Training, carry_out

PROTOCOL = 1
"""Raised by whoever changes data, judge or base recipe: then nothing in a cache counts any more."""
DOMAINS = ("python", "prose", "c", "arithmetic")
TEST_BYTES = 16384
BASE, USED = "base", "active_in_training"
AfterStep = Callable[[int, Record, Training], None]


def contestant(key: str = BASE, *, train: Mapping[str, Any] | None = None, **model: Any) -> Recipe:
    """The recipe of a paper (or the plain one), with other fields of the model or other training options."""
    return Recipe.read(key).with_model(**model).with_options(**(train or {}))


def paper(module: str) -> str:
    """The key of the paper that a module, by its ``__name__``, is about."""
    return module.rpartition(".")[2].replace("_", "-")


def setting(arms: Mapping[str, Recipe]) -> dict[str, Any]:
    """What the figures were got on, for the record."""
    recipe = next(iter(arms.values()))
    return {
        "protocol": PROTOCOL,
        "domains": list(DOMAINS),
        "steps": recipe.options.steps,
        "bytes_per_step": size_of_step(recipe),
        "test_bytes_per_domain": TEST_BYTES,
        "model": {name: recipe.model[name] for name in ("hidden_size", "num_hidden_layers", "num_experts")},
    }


def league(arms: Mapping[str, Recipe], seeds: Sequence[int], advance: Advance) -> list[dict[str, dict[str, Any]]]:
    """What :func:`play` says of every contestant, seed by seed."""
    found = []
    for number, seed in enumerate(seeds):
        played = {}
        for place, (name, recipe) in enumerate(arms.items()):
            advance(number * len(arms) + place, len(seeds) * len(arms))
            played[name] = play(recipe, seed)
        found.append(played)
    return found


def table(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Intervals over seeds of every contestant: bits per byte, active and total parameters, MaxVio."""
    names = ("bits_per_byte", "active", "total", "max_violation")
    return {name: means(column(found, name)) for name in names}


def column(found: Sequence[Mapping[str, Mapping[str, Any]]], figure: str) -> list[dict[str, float]]:
    """One figure of every contestant, seed by seed."""
    return [{name: float(one[figure]) for name, one in played.items()} for played in found]


def lead(found: Sequence[Mapping[str, Mapping[str, Any]]], worse: str, better: str) -> dict[str, float]:
    """By how many bits per byte one contestant is above another, seed by seed: an interval."""
    return gap(column(found, "bits_per_byte"), worse, better)


def play(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train and judge one contestant; from the cache where it was done before, with all the figures there are now."""
    recipe = recipe.with_options(seed=seed)
    kept = cache() / f"{fingerprint(recipe)}.json"
    if kept.is_file() and USED in (figures := json.loads(kept.read_text())):
        return figures
    model, figures = trained(recipe)
    figures |= judged(model, seed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, kept.with_suffix(".safetensors"))
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(figures, indent=1))
    partial.replace(kept)
    return figures


def at_hand(recipe: Recipe, seed: int) -> Any:
    """The trained model of a contestant, trained now or taken from the cache."""
    recipe = recipe.with_options(seed=seed)
    play(recipe, seed)
    model = recipe.build()
    load_model(model, cache() / f"{fingerprint(recipe)}.safetensors")
    running = Training(model, recipe)
    running.begin_step(recipe.options.steps - 1)  # what schedules left behind is not among the weights
    running.end()
    return model.eval()


def trained(recipe: Recipe, after_step: AfterStep | None = None) -> tuple[Any, dict[str, Any]]:
    """The recipe's model, trained, and how the training went."""
    started, model = time.process_time(), recipe.build()
    with Use(model) as use:
        _, record = carry_out(recipe, batches(recipe), model, after_step=after_step)
    rows = recipe.options.steps * recipe.options.accumulate * recipe.batch
    return model.eval(), {
        "recipe": {"model": dict(recipe.model), "train": asdict(recipe.options), "schedule": list(recipe.schedule)},
        "processor_seconds": round(time.process_time() - started, 1),
        USED: round(use.active(rows * (recipe.length + 1))),  # a row's last byte is read too
        "course": {name: thinned(values) for name, values in {"loss": record.losses, **record.parts}.items()},
    }


def batches(recipe: Recipe) -> Batches:
    """Every step's rows: all domains in equal parts, the same for all recipes of one seed, however many micro-batches
    they are read in."""
    steps = draws(recipe.options.seed, size_of_step(recipe), dict.fromkeys(DOMAINS, 1 / len(DOMAINS)))
    parts = recipe.options.accumulate

    def micro(number: int) -> Batch:
        step, part = divmod(number, parts)
        return {name: rows.chunk(parts)[part] for name, rows in steps(step).items()}

    return micro


def size_of_step(recipe: Recipe) -> int:
    """Bytes that a step foretells."""
    return recipe.options.accumulate * recipe.batch * recipe.length


def thinned(values: Sequence[float], points: int = 30) -> list[float]:
    """Means of equal stretches, as many as there are points."""
    return [round(float(np.mean(part)), 4) for part in np.array_split(np.asarray(values), min(points, len(values)))]


@torch.no_grad()
def judged(model: Any, seed: int) -> dict[str, Any]:
    """Bits per byte by domain on the seed's unseen text, what a token used, and how even the load was."""
    bits, loads, tokens, use = {}, {domain: list[Tensor]() for domain in DOMAINS}, 0, Use(model)
    lost: list[Tensor] = []
    with use:
        for domain in DOMAINS:
            ids = windows(domain, seed)
            nats = 0.0
            for rows in ids.split(16):
                out = model(input_ids=rows, use_cache=False)
                logits = out.logits[:, :-1].flatten(0, 1).float()
                loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].reshape(-1), reduction="none")
                lost.append(loss.view(len(rows), -1))
                nats += float(loss.sum())
                tokens += rows.numel()
                own = loads[domain] or [torch.zeros_like(count) for count in out.expert_load]
                loads[domain] = [a + b for a, b in zip(own, out.expert_load, strict=True)]
            bits[domain] = nats / (ids.shape[0] * (ids.shape[1] - 1)) / np.log(2)
    layers = [torch.stack(counts) for counts in zip(*loads.values(), strict=True)]  # [domains, E] each
    return {
        "bits": {domain: round(float(value), 5) for domain, value in bits.items()},
        "bits_per_byte": round(float(np.mean(list(bits.values()))), 5),
        "max_violation": mean([max_violation(counts.sum(0)) for counts in layers]),
        "specialisation": mean([mutual_information(counts.numpy().astype(float)) for counts in layers]),
        "load": [counts.sum(0).tolist() for counts in layers],
        "total": sum(p.numel() for p in model.parameters()),
        "active": round(use.active(tokens)),
        "slots_follow_loss": use.follows(torch.cat(lost)),
    }


def mean(values: Sequence[float]) -> float:
    """Over layers; 0 where a model has no experts."""
    return round(float(np.mean(values)), 4) if values else 0.0


def windows(domain: str, seed: int, length: int = 128) -> Tensor:
    """[B, length] bytes of a domain's test split."""
    body = lab.text(domain, "test", TEST_BYTES, seed).encode()
    rows = len(body) // length
    return torch.tensor(list(body[: rows * length]), dtype=torch.int64).view(rows, length)


class Use:
    """Counts, while it is open, what tokens used: every slot of experts, and everything else as often as it was called
    in a pass: an embedding that is the head too counts once, a cell shared by layers for each of them, a layer that was
    skipped not at all; what is not called by itself counts once.

    A module that does otherwise says so by a method ``active_parameters() -> int``: per token and call, all of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.slots, self.calls = model, Counter[nn.Module](), Counter[nn.Module]()
        self.tokens: dict[nn.Module, list[Tensor]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Use:
        for module in self.model.modules():
            counting = self._count if isinstance(module, Experts) else self._called
            self._hooks.append(module.register_forward_pre_hook(counting))
            for other in module.others if isinstance(module, MoE) else ():
                self._hooks.append(other.register_forward_pre_hook(self._other))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def active(self, tokens: int) -> float:
        """Parameters that a token uses on average; used twice counts twice."""
        special = [m for m in self.model.modules() if hasattr(m, "active_parameters")]
        counted = {p for m in [*self.slots, *special] for p in m.parameters()}
        used = sum(slots / tokens * size(m) / getattr(m, "num_experts", 1) for m, slots in self.slots.items())
        passes = self.calls[self.model]
        for module in self.model.modules():
            own = [p for p in module.parameters(recurse=False) if p not in counted]
            counted.update(own)
            used += sum(p.numel() for p in own) * (self.calls[module] / passes if self.calls[module] else 1)
        return used + sum(m.active_parameters() * self.calls[m] / passes for m in special)

    def follows(self, loss_BS: Tensor) -> float | None:
        """Correlation over positions of the slots used in all layers with the loss of the next token; None where every
        token uses as many, or where they cannot be told apart."""
        counts = [torch.cat(parts) for parts in self.tokens.values()]
        positions = len(loss_BS) * (loss_BS.shape[1] + 1)
        if not counts or any(len(count) != positions for count in counts):
            return None
        used = torch.stack(counts).sum(0).view(len(loss_BS), -1)[:, :-1].flatten().double()
        if bool((used == used[0]).all()):
            return None
        return round(float(torch.corrcoef(torch.stack((used, loss_BS.flatten().double())))[0, 1]), 4)

    def _other(self, module: nn.Module, args: Sequence[Any]) -> None:
        self.slots[module] += len(args[0])

    def _called(self, module: nn.Module, args: Sequence[Any]) -> None:
        self.calls[module] += 1

    def _count(self, module: Any, args: Sequence[Any]) -> None:
        used = (args[1] < module.num_experts).sum(1)
        if getattr(module, "alone", False):
            used = torch.ones_like(used)
        self.slots[module] += int(used.sum())
        self.tokens.setdefault(module, []).append(used)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def cache() -> Path:
    """Where trained contestants are kept: ``moekit/league`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "league"


def fingerprint(recipe: Recipe) -> str:
    """What a contestant's figures follow from: protocol, architecture, training."""
    told = [PROTOCOL, DOMAINS, TEST_BYTES, recipe.model, asdict(recipe.options), recipe.batch, recipe.length]
    return hashlib.sha256(json.dumps([*told, recipe.schedule], sort_keys=True).encode()).hexdigest()[:24]
