"""What the experiments on routers, trees, groups and null experts compute, on cases that can be done by hand."""

from itertools import product

import numpy as np
import pytest
import torch

from figures import changed
from moekit.contract import Context, route
from moekit.lab.experiments import adamoe_null, comet_gate, moe_plus_plus, moge, top_p_route, uni_moe_2
from moekit.lab.experiments._kinds_used import follows, slots, used
from moekit.nn.flow import Carry
from moekit.nn.selectors import Grouped, TopK
from moekit.nn.tree import ENTROPY

TOKENS = 4 * 16384


def played(loads, others=None, correlation=None):
    model = {"others": others} if others else {}
    return {"arm": {"load": loads, "recipe": {"model": model}, "slots_follow_loss": correlation}}


def test_experts_with_weights_are_counted_and_others_are_not():
    one = played([[TOKENS, 2 * TOKENS, 9], [0, TOKENS, 5]], others=["zero"])
    assert slots(one["arm"]) == [3.0, 1.0]
    two = played([[TOKENS, 0, 0], [TOKENS, 0, 0]], others=["zero"], correlation=0.5)
    assert used([one, two], "arm")["mean"] == pytest.approx(1.5)
    assert follows([one, two], "arm")["mean"] == pytest.approx(0.25)


def test_drawn_batches(monkeypatch):
    monkeypatch.setattr(moge, "DRAWS", 50)
    assert moge.imbalance(Grouped(moge.DRAWN, groups=8), 0) == (0.0, 0.0)
    some, mean = moge.imbalance(TopK(moge.DRAWN), 0)
    assert some > 0.9
    assert 0.2 < mean < 1.5
    assert moge.straggling([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]]) == pytest.approx((2 + 1) / 2)


ABOVE, ACROSS, BELOW = ({"low": m - 0.1, "mean": m, "high": m + 0.1} for m in (0.2, 0.0, -0.2))
RULES = {
    moe_plus_plus: (
        {"plus_minus_vanilla": ACROSS, "slots_follow_loss": ABOVE},
        [{"moe++, 0.25": 2.0, "moe++": 3.0}, {"moe++, 0.25": 2.1, "moe++": 3.9}],
        [("plus_minus_vanilla", ABOVE), ("slots_follow_loss", ACROSS)],
        [{"moe++, 0.25": 2.0, "moe++": 4.0}, {"moe++, 0.25": 3.0, "moe++": 3.0}],
    ),
    adamoe_null: (
        {
            "slots_follow_loss": {"null, 3": ABOVE},
            "null4_minus_top4": ACROSS,
            "null3_minus_top3": BELOW,
            "top4_minus_null3": ACROSS,
        },
        [{"null, 4": 4.0, "null, 3": 2.8}],
        [
            ("slots_follow_loss", {"null, 3": ACROSS}),
            ("null4_minus_top4", ABOVE),
            ("null3_minus_top3", ABOVE),
            ("top4_minus_null3", BELOW),
        ],
        [{"null, 4": 3.5, "null, 3": 3.0}, {"null, 4": 4.0, "null, 3": 3.4}],
    ),
    top_p_route: (
        {"topp_minus_top2": BELOW, "used_more_without_entropy": ABOVE, "slots_follow_loss": ABOVE},
        [{"top-p": 1.9}, {"top-p": 1.5}],
        [("topp_minus_top2", ABOVE), ("used_more_without_entropy", ACROSS), ("slots_follow_loss", BELOW)],
        [{"top-p": 2.0}],
    ),
    moge: (
        {"straggling_less": ABOVE, "moge_minus_ungrouped": ACROSS},
        [{"top-k": (0.995, 0.5), "grouped": (0.0, 0.0)}],
        [("straggling_less", ACROSS), ("moge_minus_ungrouped", ABOVE)],
        [{"top-k": (0.98, 0.5), "grouped": (0.0, 0.0)}, {"top-k": (1.0, 0.5), "grouped": (0.01, 0.0)}],
    ),
}


@pytest.mark.parametrize("module", RULES)
def test_every_condition_of_a_rule_can_fail(module):
    right, counts, wrong, miscounted = RULES[module]
    assert module.holds(right, counts)
    for name, value in wrong:
        assert not module.holds(changed(right, [name], value), counts), name
    for one in miscounted:
        assert not module.holds(right, [*counts, one])


def test_experts_chosen_together_are_put_apart():
    count = np.zeros((6, 6))
    for a, b in ((0, 1), (2, 3), (4, 5)):
        count[a, b] = count[b, a] = 7
    label = moge.apart(count, 3)
    assert sorted(np.bincount(label)) == [2, 2, 2]
    assert all(label[a] != label[b] for a, b in ((0, 1), (2, 3), (4, 5)))


def test_one_of_each_group_is_left():
    logits = torch.randn(5, 6)
    left = moge.one_of_each(np.array([0, 1, 0, 1, 2, 2]))(logits, Context())
    assert bool(((left > -torch.inf).sum(1) == 3).all())
    for row, kept in zip(logits, left, strict=True):
        for group in ([0, 2], [1, 3], [4, 5]):
            best = max(group, key=lambda e: float(row[e]))
            assert float(kept[best]) == float(row[best])


def test_binary_codes_by_hand():
    torch.manual_seed(0)
    codes = comet_gate.BinaryCodes(comet_gate.SITE, permute=False)
    torch.nn.init.normal_(codes.codes, std=0.1)
    x, context = torch.randn(3, comet_gate.INPUTS), Context(extra={"carry": Carry()})
    weight = codes(x, context).exp().detach()
    torch.testing.assert_close(weight.sum(1), torch.ones(3))
    step = comet_gate.smooth_step(torch.einsum("th,jbh->tjb", x, codes.codes), comet_gate.STEP).tolist()
    mix = codes.mix(x).softmax(-1).tolist()
    for t, choice in product(range(3), range(8)):
        bits = [(choice >> bit) & 1 for bit in range(3)]
        leaf = [np.prod([on if bit else 1 - on for on, bit in zip(step[t][j], bits, strict=True)]) for j in range(2)]
        wanted = sum(share * one for share, one in zip(mix[t], leaf, strict=True))
        assert float(weight[t, choice]) == pytest.approx(wanted, abs=1e-4)
    assert context.extra["carry"].state[ENTROPY].shape == (3,)


@pytest.mark.parametrize("arm", ["top-k", "top-k+", "dselect-k+", "comet+"])
def test_every_gate_learns(arm, monkeypatch):
    monkeypatch.setattr(comet_gate, "STEPS", 10)
    left, experts = comet_gate.fitted(arm, 0, 0)
    assert 0 < left < 2
    assert 1 <= experts <= 8
    router, _ = comet_gate.gate(arm)
    context = router.entered(torch.randn(2, comet_gate.INPUTS), Context())
    assert route(router, torch.randn(2, comet_gate.INPUTS), context).used.any(1).all()


@pytest.mark.parametrize("name", uni_moe_2.RULE)
def test_training_must_add_to_what_an_untrained_router_tells(name):
    right = {"rule": dict.fromkeys(uni_moe_2.RULE, ABOVE)}
    assert uni_moe_2.holds(right)
    assert not uni_moe_2.holds(changed(right, ["rule", name], ACROSS))


def test_entropy_of_single_symbols():
    assert uni_moe_2.entropy(np.array([[3, 3], [5, 5]])) == pytest.approx(np.log(2))


def test_information_between_modality_and_choice():
    apart = np.array([[[4, 0]], [[0, 4]]])
    label = np.array([0, 1])
    assert uni_moe_2.information(apart, label) == pytest.approx(np.log(2))
    assert uni_moe_2.information(np.array([[[2, 2]], [[2, 2]]]), label) == pytest.approx(0)
    assert uni_moe_2.null_shares(apart, label).tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["image", "sound"])
def test_modalities_have_ids_of_their_own(kind):
    ids = uni_moe_2.sequence(kind, np.random.default_rng(0), train=True)
    first = {"image": 256, "sound": 320}[kind]
    assert ids.shape == (64,)
    assert first <= ids.min()
    assert ids.max() < first + 64
