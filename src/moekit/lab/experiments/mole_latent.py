"""MoLE (n 71): do the experts of a trained model share a narrow input space, better than each has one of its own?

Setting: the embedded model (expert width 64, hidden size 192), judged by KL divergence from the source on 1 KB of each
of four domains' test split per seed. Gate and up are converted with the paper's latent size (64) for groups of 2, 4 and
16 experts (all of a layer).

(i) Against truncated SVD of gate and up of each expert alone, at the smallest rank that stores no fewer bytes.
(ii) Version 1 of the paper leaves down whole because it is more sensitive: what converting down adds to the loss,
against what gate and up cost per matrix, in groups of 4 and 16.
(iii) A brief recovery of the group of 16 (12 steps of distillation as in the experiment of M-SMoE, of bases, cores and
down), against SVD of equal bytes trained likewise.

Rule, written before the first run. `shown` if and only if the 95 % t interval over seeds lies above zero for (i) SVD
minus latent at every group size, (ii) the excess of down at both, and (iii) SVD minus latent after recovery. SVD of
each expert alone being as good falsifies the shared space. Conversion by whitened inputs (our extension) and reducing
every matrix to rank 48 first (phase 1), both in groups of 4, are reported and decide nothing. Training from nothing,
which carries the paper's figure of 40 % fewer parameters, is not tried here. Conversion sees no text: seeds vary what
judges and what trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moekit.bank import ExpertBank
from moekit.blocks import MoEBlock
from moekit.compress.mole_latent import train_latent, trained_bank
from moekit.formats import Factors, LowRankBank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._recovering import recovered
from moekit.lab.experiments._trial import Trial, by_method, gap
from moekit.plan import LayerPlan, Plan, values
from moekit.train.forms import LowRankSparse, Tied
from moekit.train.parametrise import held, parametrise

GROUPS, LATENT, STEPS = (2, 4, 16), 64, 12
EXTRA = {"whitened": "whiten=true", "reduced first": "reduce=48"}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return KL by group size against SVD, of each matrix, and after recovery. ``text`` is not used."""
    trial = Trial(calibration=2048, test=1024, sample=1024)
    losses: dict[str, dict[str, list[float]]] = {f"groups of {group}": {} for group in GROUPS}
    trained: dict[str, list[float]] = {"latent": [], "svd": []}
    shares: dict[str, float] = {}
    for done, seed in enumerate(seeds):
        advance(done, len(seeds))
        for group in GROUPS:
            plans, rank = contestants(trial, seed, group)
            for name, plan in plans.items():
                losses[f"groups of {group}"].setdefault(name, []).append(trial.loss(plan, seed))
            shares |= {f"{group}, {name}": trial.nbytes(plan) / trial.whole_bytes for name, plan in plans.items()}
        for name, plan in recoveries(trial, plans, rank, seed).items():  # of the widest group, which came last
            trained[name].append(trial.loss(plan, seed))
    figures = {
        **{name: by_method(found, "latent") for name, found in losses.items()},
        "excess of down": {str(group): excess(losses[f"groups of {group}"]) for group in GROUPS[1:]},
        "recovered": by_method(trained, "latent"),
        "share of bytes": shares,
    }
    return Outcome(shown=holds(figures), figures=figures, setting={**trial.setting, "steps": STEPS})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    alone = [figures[f"groups of {group}"]["svd"]["gap"]["low"] for group in GROUPS]
    more = [one["low"] for one in figures["excess of down"].values()]
    return all(low > 0 for low in (*alone, *more, figures["recovered"]["svd"]["gap"]["low"]))


def excess(losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What down adds, minus half of what gate and up cost."""
    pairs = list(zip(losses["down too"], losses["latent"], strict=True))
    return vars(gap([both - gate_up for both, gate_up in pairs], [gate_up / 2 for _, gate_up in pairs]))


def contestants(trial: Trial, seed: int, group: int) -> tuple[dict[str, Plan], int]:
    """Plans by name, and the rank of the SVD that stores no fewer bytes than the latent experts."""
    spec = f"mole-latent:rank={LATENT},group={group}"
    plans = {"latent": trial.plan(spec, seed), "down too": trial.plan(f"{spec},down=true", seed)}
    if group == GROUPS[1]:
        plans |= {name: trial.plan(f"{spec},{option}", seed) for name, option in EXTRA.items()}
    first = trial.source.moe_layers[0]
    hidden, inner = first.hidden_size, first.intermediate_size
    for rank in range((inner * LATENT + hidden * LATENT // group) // (inner + hidden), LATENT):
        plans["svd"] = truncated(trial, rank)
        if trial.nbytes(plans["svd"]) >= trial.nbytes(plans["latent"]):
            return plans, rank
    raise AssertionError("latent experts take no fewer bytes than any rank")


def truncated(trial: Trial, rank: int) -> Plan:
    """Gate and up of every expert cut by SVD, each alone."""
    layers = {}
    for layer in trial.source.moe_layers:
        bank = LowRankBank.factorise(trial.source.bank(layer.name), {"gate": rank, "up": rank, "down": None})
        layers[layer.name] = LayerPlan.identity(layer.num_experts, why="svd").valued(values.keep(bank))
    return Plan(source=trial.source.fingerprint, layers=layers)


def recoveries(trial: Trial, plans: Mapping[str, Plan], rank: int, seed: int) -> dict[str, Plan]:
    """The group of all experts and its SVD baseline, trained from where conversion left them."""
    experts = trial.source.moe_layers[0].num_experts

    def latent(block: MoEBlock, layer: LayerPlan) -> None:
        train_latent(block, [0] * experts, LATENT)

    def low_rank(block: MoEBlock, layer: LayerPlan) -> None:
        cut = [LowRankSparse(rank), LowRankSparse(rank)]
        turn = iter([*cut, Tied(range(experts))])
        parametrise(block, lambda: next(turn))
        for form in cut:
            form.keep.zero_()  # no remainder, which SVD alone does not store

    return {
        "latent": recovered(trial, plans["latent"], seed, STEPS, latent, trained_bank),
        "svd": recovered(trial, plans["svd"], seed, STEPS, low_rank, read_low_rank),
    }


def read_low_rank(block: MoEBlock, dtype: torch.dtype) -> ExpertBank:
    """Trained factors of gate and up, without a remainder, and down whole."""
    experts: list[dict[str, Any]] = [{} for _ in range(block.num_experts)]
    for part, form, tensors in held(block):
        for e, found in enumerate(experts):
            if isinstance(form, LowRankSparse):
                found[part] = Factors(tensors[0][e].detach(), tensors[1][e].detach())
            else:
                found[part] = tensors[0][e].detach()
    return LowRankBank.from_factors(experts, dtype=dtype, activation=block.bank().activation)
