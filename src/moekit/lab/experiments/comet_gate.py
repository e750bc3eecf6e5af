"""COMET (n 74): do tree gates find better experts than top-k, and does a search over permutations help any gate?

Setting: a task whose inputs (16 numbers, Gaussian) fall into 8 regions (the largest of 8 random projections), in each
of which another random linear map gives 4 outputs, with noise of 0.1 of their deviation. A layer of 8 small gated
experts, k = 2, all run and weighed by the gate (nothing of interest depends on speed). 6 gates: ``top-k`` (with the
load-balancing loss at 0.01), ``dselect-k`` (k binary codes of smooth steps), ``comet``, each alone and with a
permutation of the experts that is searched for in the first 30 % of training and then fixed ("+"). The temperature of
the search falls from 1e-3 to 1e-7 while its iterations rise from 20 to 40; no entropy of the matrix is penalised. 300
steps of 256, Adam at 1e-2. The entropy weight of dselect-k and comet (0.1) and the width of their steps (0.3) are those
of six tried for comet on seed 1, which is no seed of the run, that lost least among those that use fewer than 3
experts there: inputs next to a node's boundary use more than k. A run is judged by the share of the outputs' variance
that it leaves unexplained on 2048 unseen inputs. Every gate gets 5 random beginnings of each seed's task; the median
and the best of the five are its figures.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds lie above zero for
(top-k minus comet+) of medians, for (dselect-k minus comet+) of medians, and for (without minus with the search) of
medians, mean over the three gates. Reported besides: experts used per input, best of five, spread of the five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from moekit.contract import Context, Routing, route
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.measure import Interval
from moekit.nn import Router, Seen, Site
from moekit.nn.balance import BALANCES
from moekit.nn.flow import Carry, carry
from moekit.nn.permutation import Permutation, logarithm
from moekit.nn.schedule import Moment, Schedule
from moekit.nn.tree import ENTROPY, smooth_step

INPUTS, OUTPUTS, REGIONS, WIDTH, TOP_K, NOISE = 16, 4, 8, 16, 2, 0.1
STEPS, BATCH, RATE, TEST, BEGINNINGS = 300, 256, 1e-2, 2048, 5
GATES = ("top-k", "dselect-k", "comet")
SITE = Site(hidden_size=INPUTS, intermediate_size=WIDTH, num_experts=REGIONS, top_k=TOP_K)
STEP = 0.3
TREE = {"kind": "tree", "width": STEP}
SPARSE, BALANCED = {"leaf-entropy": 0.1}, {"load": 0.01}
SEARCH: dict[str, dict[str, Any]] = {
    "tau": {"kind": "exponential", "start": 1e-3, "end": 1e-7, "until": 0.3},
    "iterations": {"kind": "linear", "start": 20, "end": 40, "until": 0.3},
    "searching": {"kind": "steps", "values": [True, False], "at": [0.3]},
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return unexplained variance by gate, its medians and bests over beginnings. ``text`` is not used."""
    arms = [gate + sign for gate in GATES for sign in ("", "+")]
    medians, bests, spreads, experts = [], [], [], []
    for place, seed in enumerate(seeds):
        found: dict[str, list[tuple[float, float]]] = {}
        for number, arm in enumerate(arms):
            advance(place * len(arms) + number, len(seeds) * len(arms))
            found[arm] = [fitted(arm, seed, beginning) for beginning in range(BEGINNINGS)]
        left = {arm: torch.tensor([one[0] for one in runs]) for arm, runs in found.items()}
        medians.append({arm: float(values.median()) for arm, values in left.items()})
        bests.append({arm: float(values.min()) for arm, values in left.items()})
        spreads.append({arm: float(values.max() - values.min()) for arm, values in left.items()})
        experts.append({arm: sum(one[1] for one in runs) / len(runs) for arm, runs in found.items()})
    shift = [sum(one[gate] - one[gate + "+"] for gate in GATES) / len(GATES) for one in medians]
    figures: dict[str, Any] = {
        "median": means(medians),
        "best": means(bests),
        "spread": means(spreads),
        "experts_used": means(experts),
        "topk_minus_comet": gap(medians, "top-k", "comet+"),
        "dselect_minus_comet": gap(medians, "dselect-k", "comet+"),
        "shift_by_search": asdict(Interval.over_seeds(shift)),
        "shift_by_gate": {gate: gap(medians, gate, gate + "+") for gate in GATES},
    }
    shown = all(figures[name]["low"] > 0 for name in ("topk_minus_comet", "dselect_minus_comet", "shift_by_search"))
    return Outcome(shown=shown, figures=figures, setting={"steps": STEPS, "batch": BATCH, "beginnings": BEGINNINGS})


class Task:
    """Inputs and outputs of one seed."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.regions = torch.randn(REGIONS, INPUTS, generator=generator)
        self.maps = torch.randn(REGIONS, OUTPUTS, INPUTS, generator=generator) / INPUTS**0.5

    def draw(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """([T, inputs], [T, outputs]); ``number`` says which."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(count, INPUTS, generator=generator)
        y = torch.einsum("toi,ti->to", self.maps[(x @ self.regions.T).argmax(1)], x)
        return x, y + NOISE * torch.randn(y.shape, generator=generator)


class BinaryCodes(nn.Module):
    """DSelect-k (Hazimeh et al. 2021) for 2^m choices: k codes of m smooth steps each, weighed by a softmax.

    The logits are log weights, as those of a tree gate, and tell its entropy term the entropy of the codes.
    """

    def __init__(self, site: Site, permute: bool) -> None:
        super().__init__()
        bits = (site.choices - 1).bit_length()
        self.codes = nn.Parameter(torch.empty(site.top_k, bits, site.hidden_size).uniform_(-0.01, 0.01))
        self.mix = nn.Linear(site.hidden_size, site.top_k)
        self.permutation = Permutation(site.choices) if permute else None
        self.register_buffer("ones", torch.arange(site.choices)[:, None] >> torch.arange(bits) & 1)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        on = smooth_step(torch.einsum("th,jbh->tjb", x_TH, self.codes), STEP)[:, :, None]
        leaf = torch.where(self.ones.bool(), on, 1 - on).prod(-1)
        log = logarithm(leaf, 1e-5)
        carry(context).state[ENTROPY] = -(leaf * log.masked_fill(log == -torch.inf, 0)).sum((1, 2))
        weight = torch.einsum("tj,tjn->tn", self.mix(x_TH).softmax(-1), leaf * (leaf > 1e-5))
        if self.permutation is not None:
            weight = weight @ self.permutation.matrix()[0]
        return logarithm(weight)


def gate(arm: str) -> tuple[Router, dict[str, float]]:
    """A gate and the weights of its auxiliary terms."""
    name, search = arm.rstrip("+"), arm.endswith("+")
    if name == "top-k":
        return Router(SITE, {"score": "permuted" if search else "linear", "weigh": "chosen"}), BALANCED
    permute = "shared" if search else "none"
    router = Router(SITE, {"score": {**TREE, "permute": permute}, "select": "support"})
    if name == "dselect-k":
        router.scorer = BinaryCodes(SITE, search)
    return router, SPARSE


class Layer(nn.Module):
    """All experts run, their outputs weighed by the gate."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.gate, weights = gate(arm)
        self.inner = nn.Parameter(torch.randn(REGIONS, 2 * WIDTH, INPUTS) / INPUTS**0.5)
        self.outer = nn.Parameter(torch.randn(REGIONS, OUTPUTS, WIDTH) / WIDTH**0.5)
        self.terms = {name: (weight, BALANCES[name](SITE)) for name, weight in weights.items()}
        for module in self.gate.modules():
            if hasattr(module, "initialise"):
                module.initialise(0.1)

    def forward(self, x_TI: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """(outputs, auxiliary loss, routing)."""
        context = Context(extra={"carry": Carry()})
        routing = route(self.gate, x_TI, self.gate.entered(x_TI, context))
        first, second = torch.einsum("ti,ewi->tew", x_TI, self.inner).chunk(2, -1)
        each = torch.einsum("tew,eow->teo", nn.functional.silu(first) * second, self.outer)
        seen = Seen(x_TI, routing, self.gate, None, context)
        lost = sum((weight * term(seen) for weight, term in self.terms.values()), x_TI.new_zeros(()))
        return torch.einsum("te,teo->to", routing.dense(REGIONS), each), lost, routing


def fitted(arm: str, seed: int, beginning: int) -> tuple[float, float]:
    """(unexplained variance, experts used per input) of one gate from one beginning."""
    task = Task(seed)
    torch.manual_seed(1000 * seed + beginning)
    layer = Layer(arm)
    search = SEARCH if arm.endswith("+") else {}
    moving = [Schedule(layer, f"*permutation.{name}", course) for name, course in search.items()]
    optimiser = torch.optim.Adam(layer.parameters(), lr=RATE)
    for step in range(STEPS):
        for one in moving:
            one.apply(Moment(step, STEPS, seed))
        x, y = task.draw(BATCH, 10_000 * (beginning + 1) + step)
        out, lost, _ = layer(x)
        optimiser.zero_grad()
        (nn.functional.mse_loss(out, y) + lost).backward()
        optimiser.step()
    x, y = task.draw(TEST, 1)
    with torch.no_grad():
        out, _, routing = layer.eval()(x)
    return float((out - y).var() / y.var()), float(routing.used.sum(1).float().mean())
