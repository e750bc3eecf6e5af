"""Parts of different papers in one model: drawn at random, they train, look at no later token, are cached and reloaded.

In float64, where rounding orders no two experts anew. Left out: scorers that are told something, and permutations that
are still searched for, which tie experts.
"""

import random

import pytest
import torch
from wholes import leaks, tiny, tokens

from moekit.errors import OptionError
from moekit.nn import BALANCES, KINDS, MoekitForCausalLM, finish_step
from moekit.nn.activations import ACTIVATIONS
from moekit.nn.banks import BANKS
from moekit.nn.scorers import SCORERS
from moekit.nn.selectors import SELECTORS
from moekit.nn.weighers import WEIGHERS
from moekit.nn.wiring import WIRINGS

NEEDED = {
    "grouped": {"groups": 2},
    "group-limited": {"groups": 2, "keep": 1},
    "expert-choice": {"share": 0.5},
    "mlp": {"width": 8},
    "recurrent": {"width": 8},
    "product-key": {"key": 4},
    "wide": {"width": 8},
    "gru": {"width": 8},
    "cost": {"costs": [1.0] * 4},
}
TOLD = {"offered", "task-aware", "given", "permuted"}
ATTENTIONS = [
    "softmax",
    "state-space",
    {"kind": "softmax", "weights": "stick-breaking"},
    {"kind": "softmax", "window": 4},
    {"kind": "heads", "k": 1, "shared": 2},
    {"kind": "heads", "k": 1, "shared": 2, "by": "query"},
    {"kind": "experts", "experts": 3, "k": 2, "router": {"score": "recurrent"}},
    {"kind": "selected", "k": 2},
    {"kind": "sum", "of": ["softmax", "state-space"], "gates": [1.0, 0.5]},
    {"kind": "sum", "of": ["softmax", {"kind": "softmax", "window": 4}], "gates": [1.0, 0.5]},
]
SUBLAYERS = [
    "moe",
    ["moe", "dense"],
    ["moe", {"kind": "memory", "keys": 4, "top": 2}],
    ["moe", {"kind": "decomposed", "sides": 4, "heads": 2, "keep": 2, "width": 4}],
]


def drawn(seed):
    """Fields of a model that a configuration takes; what is refused is drawn again."""
    draw = random.Random(seed)

    def one(table, without=()):
        kind = draw.choice([kind for kind in table if kind not in without])
        return {"kind": kind, **NEEDED.get(kind, {})}

    while True:
        router = {
            "score": one(SCORERS, TOLD),
            "select": one(SELECTORS),
            "activation": one(ACTIVATIONS),
            "weigh": one(WEIGHERS),
        }
        term = one(BALANCES)
        fields = {
            "attention": draw.choice(ATTENTIONS),
            "feed_forward": draw.choice(SUBLAYERS),
            "wiring": one(WIRINGS),
            "experts": draw.choice(list(BANKS)),
            "router": {name: part for name, part in router.items() if draw.random() < 0.6},
            "others": [one(KINDS)] if draw.random() < 0.4 else None,
            "balance": {term.pop("kind"): {"weight": 0.1, **term}} if draw.random() < 0.5 else None,
            "correction": {"rate": 0.1} if draw.random() < 0.3 else None,
            "layers_per_bank": draw.choice([1, 1, 2]),
        }
        try:
            tiny(**fields).train()(tokens(), labels=tokens())
        except OptionError:
            continue
        return fields


@pytest.mark.parametrize("seed", range(40))
def test_parts_of_different_papers_live_in_one_model(seed, tmp_path):
    fields, ids = drawn(seed), tokens()
    model = tiny(**fields).train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite(), fields
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), fields
    finish_step(model)
    model.eval().save_pretrained(tmp_path)
    again = MoekitForCausalLM.from_pretrained(tmp_path).eval()
    for each in (model, again):
        each.double()
        for name, buffer in each.named_buffers():
            assert buffer.dtype != torch.float32, name
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        torch.testing.assert_close(again(ids, use_cache=False).logits, whole)
        if model.model.can_cache:
            begun = model(ids[:, :7], use_cache=True).past_key_values
            torch.testing.assert_close(
                model(ids[:, 7:], past_key_values=begun).logits, whole[:, 7:], atol=2e-4, rtol=1e-3
            )
    assert not leaks(model), fields
