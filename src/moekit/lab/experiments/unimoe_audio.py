"""UniMoE-Audio (n 79): do specialists, assembled and warmed up, spare a small task what joint training costs it?

Setting: two kinds of text for the paper's speech and music, 300,000 bytes of prose and 30,000 of C. A decoder of 3
layers (64 wide); MoE layers as in the recipe: 8 routed experts and one null by top-p (0.7), each 64 wide, shared ones
of 128. Every contestant gets 160 steps of 512 bytes. ``dense``: one model with layers of 512, somewhat more than the
others use, rows drawn 10 to 1 as the data are; ``moe``: the MoE model, likewise; ``moe, balanced``: rows 1 to 1
instead; ``staged``: a dense specialist (layers of 64) for 50 steps of each text, both from the same beginning;
assembled, 15 steps of gate and shared experts alone and 45 of everything, rows 1 to 1; ``no warm-up``: 60 of
everything. Judged in bits per byte on 8,192 unseen bytes of each text.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of (dense minus staged) and
(moe minus staged) on the small text lie above zero, and those of (staged minus dense) and (staged minus moe) on the
large one do not.

Reported, deciding nothing: what of it balanced rows alone do (moe, balanced minus staged), what the warm-up does, the
loss just before everything learns, on the same 64 rows of training text with and without a warm-up, and whether
positions of more loss use more real experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from moekit import lab
from moekit.build._specialists import assemble
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._league import AfterStep, Use
from moekit.lab.experiments._probing import per_byte
from moekit.measure import Interval
from moekit.train import Batch, Batches
from moekit.train.loop import Record
from moekit.train.recipe import Recipe, Training, carry_out

LARGE, SMALL = "prose", "c"
BYTES = {LARGE: 300_000, SMALL: 30_000}
STEPS, ALONE, WARM, ROWS, LENGTH, TEST_BYTES = 160, 50, 15, 8, 64, 8192
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3}
DENSE, MOE, BALANCED, STAGED, COLD = "dense", "moe", "moe, balanced", "staged", "no warm-up"


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by text, and what each step of the method does. ``text`` is not used."""
    found = []
    for number, seed in enumerate(seeds):
        advance(number, len(seeds))
        found.append(contest(seed))
    by_text = {kind: [{name: one[name]["bits"][kind] for name in one} for one in found] for kind in BYTES}
    small, large = by_text[SMALL], by_text[LARGE]
    figures = {
        "small": means(small),
        "large": means(large),
        "small_minus_staged": {name: gap(small, name, STAGED) for name in (DENSE, MOE, BALANCED, COLD)},
        "large_minus_staged": {name: gap(large, name, STAGED) for name in (DENSE, MOE, BALANCED, COLD)},
        "before_all_learns": means([{name: one[name]["before"] for name in (STAGED, COLD)} for one in found]),
        "total": {name: found[0][name]["total"] for name in found[0]},
        "active": means([{name: one[name]["active"] for name in one} for one in found]),
        "slots_follow_loss": asdict(Interval.over_seeds([one[STAGED]["follows"] or 0.0 for one in found])),
    }
    shown = all(
        figures["small_minus_staged"][name]["low"] > 0 and figures["large_minus_staged"][name]["high"] >= 0
        for name in (DENSE, MOE)
    )
    return Outcome(
        shown=shown, figures=figures, setting={"bytes": BYTES, "steps": STEPS, "bytes_per_step": ROWS * LENGTH}
    )


def contest(seed: int) -> dict[str, dict[str, Any]]:
    """Every contestant of one seed, trained and judged."""
    uneven, even = drawn(seed, BYTES), drawn(seed, dict.fromkeys(BYTES, 1.0))
    models = {
        DENSE: trained(dense(512, STEPS, seed), uneven),
        MOE: trained(sparse(STEPS, seed), uneven),
        BALANCED: trained(sparse(STEPS, seed), even),
    }
    rows = torch.cat([even(STEPS + number)["input_ids"] for number in range(8)])
    before = {}
    each = {kind: trained(dense(64, ALONE, seed), drawn(seed, {kind: 1.0})) for kind in BYTES}
    after = STEPS - len(each) * ALONE
    for name, warm in ((STAGED, WARM), (COLD, 0)):
        recipe = sparse(after, seed)
        model = recipe.build()
        assemble(model, list(each.values()))
        frozen = tuple(
            {"set": target, "course": {"kind": "steps", "values": [value, True], "at": [warm / after]}}
            for target, value in (
                ("model.trainable", False),
                ("*.gate.trainable", True),
                ("*.shared_expert.trainable", True),
            )
        )
        before[name] = per_byte(model.eval(), rows)

        def look(done: int, record: Record, running: Training, name: str = name, warm: int = warm) -> None:
            if done == warm:
                before[name] = per_byte(running.model.eval(), rows)
                running.model.train()

        models[name] = trained(replace(recipe, schedule=recipe.schedule + frozen), even, model, look)
    return {name: judged(model, seed) | {"before": before.get(name)} for name, model in models.items()}


def sparse(steps: int, seed: int) -> Recipe:
    """The paper's recipe in small."""
    return Recipe.read("unimoe-audio").with_model(**SIZES).with_options(steps=steps, seed=seed)


def dense(width: int, steps: int, seed: int) -> Recipe:
    """The same surroundings with dense layers of this width."""
    layers = {"dense_layers": list(range(SIZES["num_hidden_layers"])), "intermediate_size": width}
    return Recipe.read("base").with_model(**SIZES, **layers).with_options(steps=steps, seed=seed)


def trained(recipe: Recipe, batches: Batches, model: Any = None, after_step: AfterStep | None = None) -> Any:
    """The model that a recipe makes of these batches."""
    return carry_out(recipe, batches, model, after_step=after_step)[0].eval()


@cache
def stream(kind: str) -> np.ndarray:
    return np.frombuffer(lab.text(kind, "train", BYTES[kind]).encode(), dtype=np.uint8)


def drawn(seed: int, shares: Mapping[str, float]) -> Batches:
    """Rows of the texts in the given proportions; a batch is a function of its step."""
    kinds, weights = list(shares), np.array(list(shares.values()))

    def batch(step: int) -> Batch:
        draw = np.random.default_rng((seed, step))
        rows = []
        for kind in draw.choice(kinds, size=ROWS, p=weights / weights.sum()):
            start = draw.integers(len(stream(kind)) - LENGTH)
            rows.append(stream(kind)[start : start + LENGTH].astype(np.int64))
        return {"input_ids": torch.from_numpy(np.stack(rows))}

    return batch


@torch.no_grad()
def judged(model: Any, seed: int) -> dict[str, Any]:
    """Bits per byte of each text, parameters, and whether the slots used go with the loss."""
    bits, lost, tokens = {}, [], 0
    with Use(model) as use:
        for kind in BYTES:
            body = lab.text(kind, "test", TEST_BYTES, seed).encode()
            ids = torch.tensor(list(body[: len(body) // LENGTH * LENGTH]), dtype=torch.int64).view(-1, LENGTH)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].reshape(-1), reduction="none")
            lost.append(loss.view(len(ids), -1))
            bits[kind] = float(loss.mean()) / float(np.log(2))
            tokens += ids.numel()
        return {
            "bits": bits,
            "total": sum(p.numel() for p in model.parameters()),
            "active": float(use.active(tokens)),
            "follows": use.follows(torch.cat(lost)),
        }
