"""Hecto (n 175): does a gate send order-dependent sequences to the recurrent expert, at no loss to pairs of a kind?

Setting: sequences of a task's mark and 12 symbols, two classes. In the task ``order`` the class is which of two
symbols, both there once, comes first; in the task ``bag`` which of two symbols is there more often. The last position
holds the mean of the embeddings, as the paper's encoder gives one vector of the sequence: the gate and the feed-forward
expert read it, the recurrent expert all positions before it as well. Three pairs of experts with as many parameters:
``mixed`` (feed-forward and GRU), ``feed-forward`` and ``recurrent`` (two of a kind). Softmax at temperature 1.5, top-1,
weights as they are; load loss 0.01, entropy 0.001; 500 steps of 64 sequences; judged on 2,000 fresh ones.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds say: of ``mixed``, more than
90 % of ``order`` goes to the GRU; its accuracy minus that of ``feed-forward`` lies above zero, and minus that of
``recurrent`` above -0.02. A share of the GRU that is the same in both tasks (interval of the difference holds zero)
falsifies it. That the pair ``feed-forward`` loses ``order`` follows from what it is given, a mean without order; the
comparison is a check of the setting, and only where the sequences go is evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.contract import Context
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import gap, means
from moekit.lab.experiments._seeds import each_seed
from moekit.lab.experiments._toys import Batch, answers, fit
from moekit.nn import KINDS, Experts, MoE, Router, Site, Standalone, make
from moekit.nn.balance import balance_term
from moekit.nn.flow import begin, carry, extended

SIZE, SYMBOLS, LENGTH, STEPS, BATCH, RATE, TESTED = 32, 10, 12, 500, 64, 3e-3, 2000
GRU: dict[str, Any] = {"kind": "gru", "width": 32}
WIDTH = 77
"""Of a feed-forward expert with as many parameters as the recurrent one."""
ARMS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "mixed": (1, [GRU]),
    "feed-forward": (2, []),
    "recurrent": (0, [GRU, GRU]),
}
"""How many feed-forward experts, and which others."""
ROUTER = {
    "activation": {"kind": "softmax", "temperature": 1.5},
    "granularity": {"kind": "sequence", "pool": "last"},
    "weigh": {"kind": "scores", "normalise": False},
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return accuracies, by task too, and the share of each task that goes to the GRU. ``text`` is not used."""
    found = each_seed(seeds, advance, lambda seed: {name: measure(name, seed) for name in ARMS})
    figures = summary(found)
    return Outcome(shown=holds(figures), figures=figures, setting={"steps": STEPS, "batch": BATCH, "length": LENGTH})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    rule = figures["rule"]
    return (
        figures["gru_share"]["order"]["low"] > 0.9
        and rule["mixed - feed-forward"]["low"] > 0
        and rule["mixed - recurrent"]["low"] > -0.02
        and rule["order to gru - bag to gru"]["low"] > 0
    )


def summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    accuracy = [{name: (arm["order"] + arm["bag"]) / 2 for name, arm in one.items()} for one in found]
    share = [{"order": one["mixed"]["order to gru"], "bag": one["mixed"]["bag to gru"]} for one in found]
    tasks = [{f"{name}, {task}": arm[task] for name, arm in one.items() for task in ("order", "bag")} for one in found]
    return {
        "accuracy": means(accuracy),
        "accuracy_by_task": means(tasks),
        "gru_share": means(share),
        "parameters": {name: arm["parameters"] for name, arm in found[0].items()},
        "rule": {
            "mixed - feed-forward": gap(accuracy, "mixed", "feed-forward"),
            "mixed - recurrent": gap(accuracy, "mixed", "recurrent"),
            "order to gru - bag to gru": gap(share, "order", "bag"),
        },
    }


class Classifier(nn.Module):
    """Embeddings and their mean, one MoE layer, two classes read at the mean."""

    def __init__(self, name: str) -> None:
        super().__init__()
        stacked, others = ARMS[name]
        count = max(stacked, 1)  # a layer has one stacked expert at least; where none is wanted it is no candidate
        site = Site(hidden_size=SIZE, intermediate_size=WIDTH, num_experts=count, choices=count + len(others))
        experts = Experts(Standalone(), site)
        experts.initialise(SIZE**-0.5)
        router = Router(site, ROUTER)
        router.scorer.initialise(SIZE**-0.5)
        if not stacked:
            router.pool = torch.tensor([False] + [True] * len(others))
        balance = {name: balance_term(name, weight, site) for name, weight in (("load", 0.01), ("entropy", 0.001))}
        self.moe = MoE(router, experts, others=[make("expert", KINDS, one, site) for one in others], balance=balance)
        self.first_recurrent = count
        self.embed = nn.Embedding(SYMBOLS + 2, SIZE)
        self.head = nn.Linear(SIZE, 2)
        used = list(self.moe.others.parameters()) + (list(experts.parameters()) if stacked else [])
        self.size = sum(p.numel() for p in used)

    def forward(self, ids_BS: Tensor, context: Context) -> Tensor:
        """Logits [B, 2]; the context's carry has the routing of all positions."""
        x = self.embed(ids_BS)
        x = torch.cat((x, x.mean(1, keepdim=True) * ids_BS.shape[1] ** 0.5), dim=1)
        return self.head(self.moe(x, extended(begin(len(x), x.shape[1], x.device), carry=carry(context)))[:, -1])

    def to_gru(self, context: Context) -> Tensor:
        """bool [B]: sequences that went to a recurrent expert."""
        routing = carry(context).routing
        assert routing is not None
        return routing.expert.view(-1, LENGTH + 2)[:, -1] >= self.first_recurrent


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, S], classes [B], whether order decides [B]); symbols 0 and 1 matter in order, 2 and 3 in the bag."""
    order = torch.rand(count, generator=generator) < 0.5
    body = torch.randint(4, SYMBOLS, (count, LENGTH), generator=generator)
    place = torch.rand(count, LENGTH, generator=generator).argsort(1)
    label = torch.randint(0, 2, (count,), generator=generator)
    first, second = place[:, :2].sort(1).values.unbind(1)
    many = torch.randint(1, 4, (count,), generator=generator)
    rows = torch.arange(count)
    ordered, bag = body.clone(), body.clone()
    ordered[rows, first], ordered[rows, second] = label, 1 - label
    for number in range(2 * 3 - 1):  # `many` of one symbol and one fewer of the other, anywhere
        symbol = torch.where(number < many, 2 + label, 3 - label)
        symbol = torch.where(number < 2 * many - 1, symbol, bag[rows, place[:, number]])
        bag[rows, place[:, number]] = symbol
    mark = torch.where(order, SYMBOLS, SYMBOLS + 1)[:, None]
    return torch.cat((mark, torch.where(order[:, None], ordered, bag)), dim=1), label, order


def measure(name: str, seed: int) -> dict[str, float]:
    """Accuracy by task and where sequences went, of one pair and seed."""
    torch.manual_seed(seed)
    model, generator = Classifier(name), torch.Generator().manual_seed(seed)

    def batch(step: int) -> Batch:
        ids, label, _ = draw(BATCH, generator)
        return ids, label, {}

    fit(model, batch, STEPS, RATE, nn.functional.cross_entropy)
    ids, label, order = draw(TESTED, generator)
    logits, context = answers(model, ids)
    right, to_gru = (logits.argmax(1) == label).float(), model.to_gru(context).float()
    return {
        "order": right[order].mean().item(),
        "bag": right[~order].mean().item(),
        "order to gru": to_gru[order].mean().item(),
        "bag to gru": to_gru[~order].mean().item(),
        "parameters": float(model.size),
    }
