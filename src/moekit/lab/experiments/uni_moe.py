"""Uni-MoE (n 55): do experts trained apart, one per modality, make a better multimodal model than copies?

Setting: the embedded dense model, upcycled to 3 experts a layer, top-2, each a copy of its layer. A prompt is "rev: ",
five letters of 16 and "=", and the answer the letters backwards, which the model can do; but the letters are told by
one of three modalities. `codes`: a fixed random vector of 36 numbers per letter; `grid`: a random 6 x 6 pattern, turned
at random around both edges; `signal`: 36 samples of a wave of the letter's frequency at a random phase. Noise (0.3) is
added to each and a frozen random encoder applied (tanh of a random map to 64 features). Linear connectors lead from
there to the model's embeddings. Batches of 16 prompts; connectors and experts (and the router, where there is one to
learn) are trained, all else is frozen.

Stage 1, 40 steps, all modalities: connectors alone, the same for every contestant. `staged`: stage 2, 30 steps for each
branch on its own modality, expert and connector; then the assembled model, 40 steps on all. `copies, same last stage`:
the model of copies, 40 steps on all. `copies, same total` and `dense, same total`: 130 steps on all, of the copies and
of one expert alone. Loss in nats per letter of the answer on 64 unseen prompts of each modality; `spread` is the
largest minus the smallest of the three.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of (copies, same total minus
staged) and (dense, same total minus staged) lie above zero, for the mean loss, and that of (dense, same total minus
staged) for the spread. Information between modality and expert, and `copies, same last stage`, decide nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.blocks import Observation, blocks
from moekit.build._upcycle import copies, upcycle
from moekit.build._write import load_dense
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.upcycle import MoEForm
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.parallel.uni_moe import assemble, branch
from moekit.train import Batch, TrainOptions, train

MODALITIES = ("codes", "grid", "signal")
LETTERS, COUNT, RAW, FEATURES, NOISE, ROWS, TEST = 16, 5, 36, 64, 0.3, 16, 64
STEPS = {"align": 40, "branch": 30, "last": 40}
RATE = 1e-3
STAGED, COPIES, DENSE, LAST = "staged", "copies, same total", "dense, same total", "copies, same last stage"


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses and spreads by contestant, and how much an expert tells of the modality. ``text`` is not used."""
    losses: list[dict[str, float]] = []
    spreads: list[dict[str, float]] = []
    details: list[dict[str, float]] = []
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        found, told = contest(seed)
        losses.append({name: float(np.mean(list(by.values()))) for name, by in found.items()})
        spreads.append({name: max(by.values()) - min(by.values()) for name, by in found.items()})
        details.append({f"{name}, {m}": v for name, by in found.items() for m, v in by.items()} | told)
    figures = {
        "loss": means(losses),
        "spread": means(spreads),
        "details": means(details),
        "loss gap": {f"{name} minus staged": gap(losses, name, STAGED) for name in (COPIES, DENSE, LAST)},
        "spread gap": {f"{name} minus staged": gap(spreads, name, STAGED) for name in (COPIES, DENSE)},
    }
    setting = {"model": "moekit:dense", "steps": STEPS, "rows": ROWS, "features": FEATURES, "noise": NOISE}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    better = all(figures["loss gap"][f"{name} minus staged"]["low"] > 0 for name in (COPIES, DENSE))
    return bool(better and figures["spread gap"][f"{DENSE} minus staged"]["low"] > 0)


def contest(seed: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Losses by contestant and modality, and bits that experts tell of the modality."""
    scene = Scene(seed)
    start = aligned(scene, seed)
    total = len(MODALITIES) * STEPS["branch"] + STEPS["last"]
    branches = []
    for number, modality in enumerate(MODALITIES):
        one = copy.deepcopy(start)
        fit(one, scene, (modality,), STEPS["branch"], seed + 1 + number, expert=number)
        branches.append(one)
    staged = assemble(branches)
    for number, one in enumerate(branches):
        staged.connectors.take(one.connectors, number)
    models = {STAGED: staged, LAST: copy.deepcopy(start), COPIES: copy.deepcopy(start), DENSE: start}
    steps = {STAGED: STEPS["last"], LAST: STEPS["last"], COPIES: total, DENSE: total}
    found, told = {}, {}
    for name, model in models.items():
        expert = 0 if name == DENSE else None
        fit(model, scene, MODALITIES, steps[name], seed + 10, expert=expert)
        found[name] = {m: judged(model, scene, m, expert) for m in MODALITIES}
        if expert is None:
            told[f"{name}, bits of modality by expert"] = information(model, scene)
    return found, told


class Scene:
    """What letters look like in each modality, from a seed."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.codes = torch.randn(LETTERS, RAW, generator=draw)
        self.patterns = (torch.rand(LETTERS, 6, 6, generator=draw) < 0.5).float() * 2 - 1
        self.encoders = torch.randn(len(MODALITIES), RAW, FEATURES, generator=draw) / RAW**0.5

    def batch(self, seed: int, step: int, modalities: Sequence[str], rows: int = ROWS) -> Batch:
        """``features`` [B, N, F], ``modality`` [B] and ``letters`` [B, N] of prompts."""
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        letters = torch.randint(0, LETTERS, (rows, COUNT), generator=draw)
        number = torch.tensor([MODALITIES.index(modalities[row % len(modalities)]) for row in range(rows)])
        raw = torch.stack([self.raw(int(m), line, draw) for m, line in zip(number, letters, strict=True)])
        raw = raw + NOISE * torch.randn(raw.shape, generator=draw)
        features = torch.einsum("bnr,brf->bnf", raw, self.encoders[number]).tanh()
        return {"features": features, "modality": number, "letters": letters}

    def raw(self, modality: int, letters: Tensor, draw: torch.Generator) -> Tensor:
        """[N, R]: letters as one modality shows them."""
        if modality == 0:
            return self.codes[letters]
        if modality == 1:
            shifts = torch.randint(0, 6, (len(letters), 2), generator=draw).tolist()
            rolled = [self.patterns[i].roll(tuple(s), (0, 1)) for i, s in zip(letters, shifts, strict=True)]
            return torch.stack(rolled).flatten(1)
        phase = torch.rand(len(letters), 1, generator=draw)
        time = torch.arange(RAW) / RAW
        return 2**0.5 * torch.sin(2 * torch.pi * ((letters[:, None] + 1) * time + phase))


class Connectors(nn.Module):
    """A linear map per modality from features [B, N, F] to embeddings [B, N, H]."""

    def __init__(self, count: int, features: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, features, hidden) * 0.02)
        self.bias = nn.Parameter(torch.zeros(count, hidden))

    def forward(self, features: Tensor, modality: Tensor) -> Tensor:
        return torch.einsum("bnf,bfh->bnh", features, self.weight[modality]) + self.bias[modality][:, None]

    @torch.no_grad()
    def take(self, other: Connectors, number: int) -> None:
        """One modality's map from another's."""
        self.weight[number], self.bias[number] = other.weight[number], other.bias[number]


def aligned(scene: Scene, seed: int) -> Any:
    """The model of copies after stage 1."""
    dense = load_dense(Checkpoint.open("moekit:dense"))
    config = dense.config
    form = MoEForm(
        layers=tuple(range(config.num_hidden_layers)),
        num_experts=len(MODALITIES),
        top_k=2,
        intermediate_size=config.intermediate_size,
    )
    model: Any = upcycle(dense, form, copies(len(MODALITIES)), seed=seed)
    torch.manual_seed(seed)
    model.connectors = Connectors(len(MODALITIES), FEATURES, config.hidden_size)
    fit(model, scene, MODALITIES, STEPS["align"], seed, expert=0, what=("connectors.*",))
    return model


def fit(
    model: Any,
    scene: Scene,
    modalities: Sequence[str],
    steps: int,
    seed: int,
    expert: int | None = None,
    what: Sequence[str] = ("connectors.*", "experts", "router"),
) -> None:
    """Train in place; with ``expert`` every token passes that one."""
    options = TrainOptions(steps=steps, learning_rate=RATE, course="cosine", seed=seed)
    batches = partial(_batch, scene, seed, modalities)
    if expert is not None:
        what = [part for part in what if part != "router"]
    with branch(model, expert) if expert is not None else nullcontext():
        train(model, _loss, batches, options, what=what)


def _batch(scene: Scene, seed: int, modalities: Sequence[str], step: int) -> Batch:
    return scene.batch(seed, step, modalities)


def _loss(model: Any, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Cross-entropy of the letters backwards."""
    answer = batch["letters"].flip(1) + ord("a")
    rows = len(answer)
    before, after = (torch.tensor([list(s.encode())]).expand(rows, -1) for s in ("rev: ", "="))
    embed = model.get_input_embeddings()
    seen = model.connectors(batch["features"], batch["modality"])
    inputs = torch.cat([embed(before), seen, embed(after), embed(answer[:, :-1])], 1)
    logits = model(inputs_embeds=inputs, use_cache=False).logits[:, -COUNT:]
    return F.cross_entropy(logits.flatten(0, 1).float(), answer.flatten()), {}


@torch.no_grad()
def judged(model: Any, scene: Scene, modality: str, expert: int | None) -> float:
    """Nats per letter on unseen prompts of one modality."""
    model.eval()
    with branch(model, expert) if expert is not None else nullcontext():
        return float(_loss(model, scene.batch(-1, 0, (modality,), TEST))[0])


@torch.no_grad()
def information(model: Any, scene: Scene) -> float:
    """Bits that the expert of a letter's slot tells of its modality, mean over layers; log2(3) at most."""
    found: list[np.ndarray] = []
    batch = scene.batch(-1, 0, MODALITIES, TEST)
    with _counting(model, batch["modality"], found):
        _loss(model.eval(), batch)
    return float(np.mean([_mutual(table) for table in found]))


@contextmanager
def _counting(model: Any, modality: Tensor, found: list[np.ndarray]) -> Iterator[None]:
    """Tables [modality, expert] of the slots of the letters' positions, layer by layer."""
    rows = len(modality)

    def count(seen: Observation) -> None:
        expert = seen.routing.expert.view(rows, -1, seen.routing.expert.shape[1])[:, 5 : 5 + COUNT]
        table = np.zeros((len(MODALITIES), seen.block.num_experts))
        np.add.at(table, (np.broadcast_to(modality.numpy()[:, None, None], expert.shape), expert.numpy()), 1)
        found.append(table)

    observers = [block.observe(count).attach() for block in blocks(model)]
    try:
        yield
    finally:
        for observer in observers:
            observer.remove()


def _mutual(table: np.ndarray) -> float:
    joint = table / table.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    used = joint > 0
    return float((joint[used] * np.log2(joint[used] / apart[used])).sum())
