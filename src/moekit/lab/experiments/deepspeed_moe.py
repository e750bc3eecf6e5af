"""DeepSpeed-MoE (n 166): residual experts, pyramids and staged students at equal parameters; the exchange is exact.

Setting: composable models of 4 layers, hidden size 96, from nothing, 120 steps of 512 tokens of the embedded models'
mixture; every token passes 96 hidden units of feed-forward a layer. Equal in all parameters too (384 hidden units a
layer on average; coefficients and routers not counted): `top-1` (4 experts of 96), `top-2` (8 of 48), `residual` (7 of
48, top-1, and an MLP of 48, mixed by coefficients), `pyramid` and `inverse` (residual, with 5, 5, 9, 9 and 9, 9, 5, 5
experts). `twice` is top-2 with 16 experts. Students of `pyramid` with 3 layers (5, 9, 9): `alone`, `taught` (KL of
weight 1 throughout), `staged` (KL until 60 % of the steps). Bits per byte on the test split, mean over all domains.
Exchange: 4 real processes (gloo) as 2 tensor-parallel pairs, 6 experts, all routings, against one process in float64,
and rows sent against the flat all-to-all. Tables: an exchange by indices against one-hot einsums, values and gradients.

Rule, written before the first run. `shown` if and only if all of these hold:

1. No output or gradient of the coordinated exchange is off by more than 1e-6 of the largest, it sends half the rows of
   the flat one, and index tables equal one-hot einsums to 1e-12.
2. The 95 % t intervals over seeds of (top-1 minus residual), (inverse minus pyramid) and (alone minus staged) lie above
   zero.

The gaps of residual to top-2, pyramid to twice, and taught to staged are reported and decide nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.lab._recipe import RECIPES
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._coordinating import coordinated, rows_sent
from moekit.lab.experiments._outer_training import BALANCE, LENGTH, RATE, draws, ground
from moekit.lab.experiments._spread import PATIENCE
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.parallel import LocalRanks
from moekit.parallel.deepspeed_moe import Students, mixed, shallower
from moekit.train import TrainOptions

HIDDEN, LAYERS, WIDTH, STEPS, TOKENS, DEGREE = 96, 4, 48, 120, 512, 2
ARMS: dict[str, dict[str, Any]] = {
    "top-1": {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 2 * WIDTH},
    "top-2": {"num_experts": 8, "num_experts_per_tok": 2},
    "residual": {"num_experts": 7},
    "pyramid": {"num_experts": [5, 5, 9, 9]},
    "inverse": {"num_experts": [9, 9, 5, 5]},
    "twice": {"num_experts": 16, "num_experts_per_tok": 2},
}
RESIDUAL = ("residual", "pyramid", "inverse")
STUDENTS = {"alone": Students(weight=0.0), "taught": Students(share=1.0), "staged": Students(share=0.6)}
DECIDING = (("top-1", "residual"), ("inverse", "pyramid"), ("alone", "staged"))
REPORTED = (("residual", "top-2"), ("pyramid", "twice"), ("taught", "staged"))


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return bits per byte by contestant, sizes, and the gaps of the exchange. ``text`` is not used."""
    found, sizes = [], dict[str, int]()
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        losses, sizes = contest(seed)
        found.append(losses)
    with LocalRanks(4, patience=PATIENCE) as ranks:
        gaps = ranks.ask(coordinated, DEGREE)
        sent = ranks.ask(rows_sent, DEGREE)
    figures = {
        "bits_per_byte": means(found),
        "gap": {f"{worse} minus {better}": gap(found, worse, better) for worse, better in (*DECIDING, *REPORTED)},
        "parameters": sizes,
        "exchange": {
            "gap": max(max(one.values()) for one in gaps),
            "rows": {name: sum(one[name] for one in sent) for name in sent[0]},
        },
        "tables": tables(),
    }
    setting = {"hidden_size": HIDDEN, "layers": LAYERS, "steps": STEPS, "tokens_per_step": TOKENS, "context": LENGTH}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    exchange = figures["exchange"]
    same = exchange["gap"] <= 1e-6 and figures["tables"]["gap"] <= 1e-12
    halved = DEGREE * exchange["rows"]["coordinated"] == exchange["rows"]["flat"]
    better = all(figures["gap"][f"{a} minus {b}"]["low"] > 0 for a, b in DECIDING)
    return bool(same and halved and better)


def contest(seed: int) -> tuple[dict[str, float], dict[str, int]]:
    """Bits per byte of every contestant, and how many parameters each has."""
    losses, sizes, teacher = {}, {}, None
    for name in ARMS:
        model = fresh(config(name), name in RESIDUAL, seed)
        fit(model, STUDENTS["alone"], None, seed)
        losses[name], sizes[name] = judged(model, seed), model.num_parameters()
        teacher = model if name == "pyramid" else teacher
    for name, way in STUDENTS.items():
        model = fresh(shallower(config("pyramid"), LAYERS - 1), True, seed + 1)
        fit(model, way, teacher, seed)
        losses[name], sizes[name] = judged(model, seed), model.num_parameters()
    return losses, sizes


def config(name: str) -> MoekitConfig:
    """An arm's configuration, with the embedded models' vocabulary."""
    stock = RECIPES["dense"].config()
    own = {"num_experts_per_tok": 1, "moe_intermediate_size": WIDTH} | ARMS[name]
    if name in RESIDUAL:
        own["shared_expert_intermediate_size"] = WIDTH
    return MoekitConfig(
        vocab_size=stock.vocab_size,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=stock.bos_token_id,
        eos_token_id=stock.eos_token_id,
        pad_token_id=stock.pad_token_id,
        # the weight of a single expert must be its probability, or its router learns nothing
        router={"weigh": {"kind": "scores", "normalise": False}},
        balance={"load": BALANCE},
        **own,
    )


def fresh(made: MoekitConfig, residual: bool, seed: int) -> Any:
    """A model from nothing."""
    torch.manual_seed(seed)
    model = MoekitForCausalLM(copy.deepcopy(made))
    return mixed(model) if residual else model


def fit(model: Any, way: Students, teacher: Any, seed: int) -> None:
    """Train in place; every contestant of a seed sees the same batches."""
    batches = draws(seed, TOKENS, RECIPES["dense"].phases[0].mixture)
    options = TrainOptions(steps=STEPS, learning_rate=RATE, course="cosine", weight_decay=0.1, seed=seed)
    way.train(model, teacher if teacher is not None else model, batches, options)


def judged(model: Any, seed: int) -> float:
    return ground().loss(model.eval(), seed)


def tables(tokens: int = 256, experts: int = 16, hidden: int = 64) -> dict[str, float]:
    """Rows to experts and back by index tables and by one-hot einsums: the gap, and how much longer the latter took."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=draw, dtype=torch.float64)
    expert = torch.randint(0, experts, (tokens,), generator=draw)
    place = (F.one_hot(expert, experts).cumsum(0) - 1).gather(1, expert[:, None])[:, 0]
    room, goal = int(place.max()) + 1, torch.randn(tokens, hidden, generator=draw, dtype=torch.float64)
    mask = torch.zeros(tokens, experts, room, dtype=torch.float64)
    mask[torch.arange(tokens), expert, place] = 1
    scale = torch.randn(experts, 1, hidden, generator=draw, dtype=torch.float64)

    def einsums(x_TH: Tensor) -> Tensor:
        return torch.einsum("tec,ech->th", mask, torch.einsum("tec,th->ech", mask, x_TH) * scale)

    def indices(x_TH: Tensor) -> Tensor:
        sent = x_TH.new_zeros(experts * room, hidden).index_copy(0, expert * room + place, x_TH)
        return (sent.view(experts, room, hidden) * scale).view(-1, hidden).index_select(0, expert * room + place)

    answers, seconds = [], []
    for way in (einsums, indices):
        leaf = x.clone().requires_grad_()
        start = time.process_time()
        out = way(leaf)
        (grad,) = torch.autograd.grad(((out - goal) ** 2).sum(), leaf)
        seconds.append(time.process_time() - start)
        answers.append(torch.cat([out, grad]).detach())
    gap = float((answers[0] - answers[1]).abs().max() / answers[0].abs().max())
    return {"gap": gap, "einsum_seconds_over_table_seconds": seconds[0] / max(seconds[1], 1e-9), "experts": experts}
