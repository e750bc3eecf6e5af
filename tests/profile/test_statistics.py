"""Every statistic against a plain loop over tokens and slots."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moekit.contract import Routing
from moekit.profile._figures import make
from moekit.profile._reservoir import Reservoir
from moekit.profile._view import Cells, View
from moekit.profile.layer import LayerProfile
from moekit.profile.schema import FIELDS, RATIO_BINS
from moekit.profile.statistics import Room, Statistic

E, T, K, H, D = 5, 9, 2, 6, 2
SHARED = torch.nn.Sequential(torch.nn.Tanh())
PRIORITY = np.array([50, 60, 70, 10, 80, 90, 95, 0, 5], dtype=np.uint64)
"""Token 7 is padding, so tokens 8 and 3 (of domain 0 and 1) come first."""


@pytest.fixture
def scene():
    """One batch with padding and unused slots, in random numbers."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(T, E, generator=generator)
    weight, expert = logits.softmax(1).topk(K, dim=1)
    expert[4, 1], weight[4, 1] = -1, 0.0
    expert[6], weight[6] = -1, 0.0
    slots = torch.randn(T, K, H, generator=generator).masked_fill((expert < 0)[..., None], 0)
    routing = Routing(expert, weight, logits)
    seen = SimpleNamespace(
        x_TH=torch.randn(T, H, generator=generator),
        routing=routing,
        slots_TKH=slots,
        routed_TH=(slots * weight[..., None]).sum(1),
        residual_TH=torch.randn(T, H, generator=generator),
        block=SimpleNamespace(layout=SimpleNamespace(weights_on_input=False), shared=(SHARED, torch.nn.Linear(H, 1))),
    )
    seen.router_TH = seen.x_TH
    cell = torch.tensor([0, 0, 2, 2, 5, 5, 7, -1, 0])
    previous = torch.randint(0, 3, (T, K), generator=generator)
    return seen, Cells(cell, PRIORITY, trace=([0, 1, 2], [0, 1, 2])), previous


def fed(name, scene, times=1):
    seen, cells, previous = scene
    sample = Reservoir(2, 0)
    statistic = make(name, Room(E, D, 3, 4, sample))
    for _ in range(times):
        view = View(seen, cells, E, previous)
        view.sampled = sample.admit(view.priority_T, view.domain_T(D).numpy(), view.expert_TK.numpy())
        statistic.observe(view)
    return statistic


def observe(name, scene, times=1):
    return fed(name, scene, times).result()


def slots_of(scene):
    """(cell, expert, token, slot) of every used slot of every real token."""
    seen, cells, _ = scene
    for t in range(T):
        for k in range(K):
            if cells.cell[t] >= 0 and seen.routing.expert[t, k] >= 0:
                yield int(cells.cell[t]), int(seen.routing.expert[t, k]), t, k


def figures(scene, name, t, k):
    seen = scene[0]
    weight, slot = float(seen.routing.weight[t, k]), seen.slots_TKH[t, k].double()
    norm = float(slot.norm())
    h, after = seen.residual_TH[t].double(), (seen.residual_TH[t].double() + seen.routed_TH[t].double())
    change = max(0.0, 1 - float(h @ after / (h.norm() * after.norm())))
    return {
        "counts": 1.0,
        "weight": weight,
        "output_norm": norm,
        "gate_norm": weight * norm,
        "contribution": change * weight * norm,
        "output_energy": (weight * norm) ** 2,
    }[name]


@pytest.mark.parametrize("name", ["counts", "weight", "output_norm", "gate_norm", "contribution", "output_energy"])
def test_slot_sums(scene, name):
    expected = np.zeros((2 * D * 2, E))
    for cell, expert, t, k in slots_of(scene):
        expected[cell, expert] += figures(scene, name, t, k)
    np.testing.assert_allclose(observe(name, scene).reshape(expected.shape), expected, rtol=1e-6)
    np.testing.assert_allclose(observe(name, scene, times=2).reshape(expected.shape), 2 * expected, rtol=1e-6)


def test_token_sums(scene):
    seen, cells, _ = scene
    probability, entropy = np.zeros((2 * D * 2, E)), np.zeros(2 * D * 2)
    tokens, energy = np.zeros(2 * D * 2), np.zeros(2 * D * 2)
    for t in range(T):
        if (cell := int(cells.cell[t])) < 0:
            continue
        p = seen.routing.logits[t].double().softmax(0)
        probability[cell] += p.numpy()
        entropy[cell] += -sum(float(x) * math.log(float(x)) for x in p)
        tokens[cell] += 1
        energy[cell] += float(seen.residual_TH[t].double().square().sum())
    np.testing.assert_allclose(observe("probability", scene).reshape(-1, E), probability, rtol=1e-6)
    np.testing.assert_allclose(observe("entropy", scene).ravel(), entropy, rtol=1e-6)
    np.testing.assert_array_equal(observe("tokens", scene).ravel(), tokens)
    np.testing.assert_allclose(observe("residual_energy", scene).ravel(), energy, rtol=1e-6)


def test_pairs_of_experts(scene):
    seen, cells, previous = scene
    together, follows = np.zeros((E, E)), np.zeros((3, E))
    gram, moments, own = np.zeros((E, E)), np.zeros((H, H)), np.zeros((E, H, H))
    for t in range(T):
        if cells.cell[t] < 0:
            continue
        chosen = {int(e) for e in seen.routing.expert[t] if e >= 0}
        for a in chosen:
            own[a] += np.outer(seen.x_TH[t].double(), seen.x_TH[t].double())
            for b in chosen:
                together[a, b] += 1
            for f in {int(f) for f in previous[t]}:
                follows[f, a] += 1
        gram += np.outer(seen.routing.logits[t].double(), seen.routing.logits[t].double())
        moments += np.outer(seen.x_TH[t].double(), seen.x_TH[t].double())
    np.testing.assert_array_equal(observe("coactivation", scene), together)
    np.testing.assert_array_equal(observe("transition", scene), follows)
    np.testing.assert_allclose(observe("logit_gram", scene), gram, rtol=1e-9)
    np.testing.assert_allclose(observe("input_moments", scene), moments, rtol=1e-9)
    np.testing.assert_allclose(observe("expert_moments", scene), own, rtol=1e-9)


def test_the_largest_output_is_over_all_real_tokens(scene):
    expected = np.zeros(E)
    for _, expert, t, k in slots_of(scene):
        expected[expert] = max(expected[expert], float(scene[0].slots_TKH[t, k].abs().max()))
    np.testing.assert_allclose(observe("max_abs_down", scene), expected, rtol=1e-7)


def test_the_largest_shared_output_leaves_out_padding_and_gates(scene):
    real = [t for t in range(T) if scene[1].cell[t] >= 0]
    expected = float(scene[0].x_TH[real].tanh().abs().max())
    np.testing.assert_allclose(observe("max_abs_shared", scene), [expected], rtol=1e-6)
    scene[0].block.shared = ()
    assert observe("max_abs_shared", scene) is None


def test_the_winning_logit_counts_for_its_expert_alone(scene):
    seen, cells, _ = scene
    expected = np.zeros((2 * D * 2, E))
    for t in range(T):
        if (cell := int(cells.cell[t])) >= 0:
            winner = int(seen.routing.logits[t].argmax())
            expected[cell, winner] += float(seen.routing.logits[t, winner])
    np.testing.assert_allclose(observe("strong_logit", scene).reshape(-1, E), expected, rtol=1e-6)


def test_probability_of_the_chosen_is_before_any_normalisation(scene):
    seen, _, _ = scene
    expected = np.zeros((2 * D * 2, E))
    for cell, expert, t, _ in slots_of(scene):
        expected[cell, expert] += float(seen.routing.logits[t].double().softmax(0)[expert])
    seen.routing = seen.routing.with_weight(seen.routing.weight * 7)
    np.testing.assert_allclose(observe("selected_probability", scene).reshape(-1, E), expected, rtol=1e-6)


def test_ratios_of_the_two_largest_weights(scene):
    seen, cells, _ = scene
    expected = np.zeros((2 * D * 2, RATIO_BINS))
    ratios = []
    for t in range(T):
        small, large = sorted(float(w) for w in seen.routing.weight[t])
        if cells.cell[t] >= 0 and small > 0:
            ratios.append(small / large)
            expected[int(cells.cell[t]), int(small / large * RATIO_BINS)] += 1
    found = observe("weight_ratio", scene).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)
    layer = LayerProfile("a", 0, E, K, ("x", "y"), {"weight_ratio": observe("weight_ratio", scene)})
    assert layer.median_ratio() == pytest.approx(np.quantile(ratios, 0.5, method="inverted_cdf"), abs=1 / RATIO_BINS)
    one = seen.routing
    seen.routing = Routing(one.expert[:, :1], one.weight[:, :1], one.logits)
    assert observe("weight_ratio", scene) is None
    layer.arrays["weight_ratio"][:] = 0
    assert np.isnan(layer.median_ratio())


def test_samples_and_traces_keep_rows(scene):
    seen = scene[0]
    rows = [8, 3]
    np.testing.assert_array_equal(observe("hidden", scene), seen.x_TH[rows].numpy())
    np.testing.assert_array_equal(observe("sample_expert", scene), seen.routing.expert[rows].numpy())
    np.testing.assert_array_equal(observe("sample_weight", scene), seen.routing.weight[rows].numpy())
    np.testing.assert_array_equal(observe("sample_logits", scene), seen.routing.logits[rows].numpy())
    np.testing.assert_array_equal(observe("sample_domain", scene), [0, 1])
    np.testing.assert_array_equal(observe("sample_priority", scene), [5, 10])
    np.testing.assert_array_equal(observe("trace_expert", scene)[:3], seen.routing.expert[:3].numpy())
    assert (observe("trace_expert", scene)[3] == -1).all()
    np.testing.assert_array_equal(observe("trace_weight", scene)[:3], seen.routing.weight[:3].numpy())


def test_samples_of_half_precision_are_kept_in_float32(scene):
    seen = scene[0]
    seen.x_TH, seen.routing = seen.x_TH.bfloat16(), seen.routing.with_weight(seen.routing.weight.bfloat16())
    for name, tensor in (("hidden", seen.x_TH), ("sample_weight", seen.routing.weight)):
        found = observe(name, scene)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor[[8, 3]].float().numpy())


def test_what_a_model_cannot_give_stays_out(scene):
    seen, cells, _ = scene
    seen.routing = Routing(seen.routing.expert, seen.routing.weight, None)
    seen.residual_TH = None
    without_logits = ("probability", "selected_probability", "strong_logit", "sample_logits", "entropy", "logit_gram")
    for name in (*without_logits, "contribution", "residual_energy"):
        assert observe(name, (seen, cells, None)) is None
    assert observe("transition", (seen, cells, None)) is None
    assert observe("counts", (seen, cells, None)).sum() == 13


def test_a_token_contributes_nothing_where_the_routed_part_changes_no_direction(scene):
    seen, cells, previous = scene
    seen.routed_TH = seen.residual_TH * 0.5
    assert np.abs(observe("contribution", (seen, cells, previous))).max() < 1e-12
    seen.routed_TH = seen.residual_TH * -1.5
    assert observe("contribution", (seen, cells, previous)).sum() > 0.5


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_statistic_of_its_shape(scene, name):
    statistic = fed(name, scene)
    assert isinstance(statistic, Statistic)
    result = statistic.result()
    assert result.ndim == len(FIELDS[name].axes)
    assert FIELDS[name].merge == "rows" or result.dtype == np.float64
