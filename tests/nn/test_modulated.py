"""Experts as modulations of one base, and the router that weighs by agreement."""

import pytest
import torch
import torch.nn.functional as F
from wholes import lives, tiny, tokens

from moekit.contract import Context
from moekit.errors import OptionError
from moekit.nn import Router, Site, Standalone
from moekit.nn.calibrated import Calibrated
from moekit.nn.modulated import ModulatedExperts

SITE = Site(hidden_size=6, intermediate_size=5, num_experts=4, top_k=2)


def bank(form="linear", seed=0, **options):
    torch.manual_seed(seed)
    experts = ModulatedExperts(Standalone(), SITE, form=form, **options)
    experts.initialise(0.5)
    return experts


@pytest.mark.parametrize("form", ["linear", "vector"])
def test_equals_the_formula(form):
    experts, x = bank(form), torch.randn(9, 6)
    index, weight = torch.randint(0, 5, (9, 2)), torch.rand(9, 2)
    n = F.layer_norm(x, (6,))
    z = F.gelu(n @ experts.base_gate.weight.T) * (n @ experts.base_up.weight.T)
    mixed = torch.zeros(9, 6)
    for t in range(9):
        for k in range(2):
            if (e := int(index[t, k])) < 4:
                both = experts.modulation_bias[e]
                if form == "linear":
                    both = both + experts.modulation[e] @ z[t]
                mixed[t] += weight[t, k] * (both[:6] * z[t] + both[6:])
    expected = F.gelu(mixed @ experts.adaptor_up.weight.T) @ experts.adaptor_down.weight.T
    assert torch.allclose(experts(x, index, weight), expected, atol=1e-5)


def test_equal_modulations_are_no_experts_at_all():
    """With scale 1 and shift 0 everywhere, and weights that sum to 1, only the base and the adaptor are left."""
    experts, x = bank("vector"), torch.randn(7, 6)
    with torch.no_grad():
        experts.modulation_bias[:, :6] = 1
        experts.modulation_bias[:, 6:] = 0
    outs = [experts(x, torch.full((7, 1), e), torch.ones(7, 1)) for e in range(4)]
    assert all(torch.allclose(out, outs[0], atol=1e-6) for out in outs)


def test_parameters_against_full_experts():
    site = Site(hidden_size=16, intermediate_size=64, num_experts=8, top_k=2)
    shared = ModulatedExperts(Standalone(), site)
    linear, full = sum(p.numel() for p in shared.parameters()), 8 * 2 * 16 * 64
    assert linear == 2 * 256 + 32 + 8 * (2 * 256 + 32) + 2 * 16 * 64
    assert linear < 0.45 * full
    assert shared.active_parameters() == linear - 6 * (2 * 256 + 32)
    assert ModulatedExperts(Standalone(), site, width=8).adaptor_up.weight.shape == (8, 16)


def test_empty_and_half_precision():
    experts = bank().to(torch.bfloat16)
    assert experts(
        torch.zeros(0, 6, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    ).shape == (0, 6)
    out = experts(torch.randn(3, 6).bfloat16(), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["linear", "vector"])
def test_in_a_model(tmp_path, form):
    lives(tmp_path, experts={"kind": "modulated", "form": form}, router={"score": "calibrated"})


def scorer(**options):
    torch.manual_seed(3)
    part = Calibrated(SITE, **options)
    part.initialise(1.0)
    return part.train()


def test_ensemble_is_mean_and_deviation_of_runs_under_dropout():
    part, x = scorer(passes=4, dropout=0.3), torch.randn(10, 6)
    torch.manual_seed(4)
    runs = torch.stack([(F.dropout(x, 0.3) @ part.weight.T).softmax(-1) for _ in range(4)])
    torch.manual_seed(4)
    mean, deviation = part.ensemble(x)
    assert torch.allclose(mean, runs.mean(0), atol=1e-6)
    assert torch.allclose(deviation, runs.std(0), atol=1e-5)
    torch.manual_seed(4)
    weight = part(x, Context()).softmax(-1)
    expected = runs.mean(0) / (runs.std(0) + 0.1)
    assert torch.allclose(weight, expected / expected.sum(1, keepdim=True), atol=1e-5)


def test_without_dropout_it_is_the_plain_router():
    """No disagreement: the same probabilities while training as afterwards."""
    part, x = scorer(dropout=0.0), torch.randn(10, 6)
    trained = part(x, Context()).softmax(-1)
    assert torch.allclose(trained, (x @ part.weight.T).softmax(-1), atol=1e-6)
    assert torch.equal(part.eval()(x, Context()), x @ part.weight.T)


def test_disagreement_lowers_weight():
    part = scorer(passes=50, dropout=0.5)
    with torch.no_grad():
        part.weight.zero_()
        part.weight[0, 0] = 3.0  # expert 0 speaks only through one input, which dropout takes away half of the time
    x = torch.zeros(1, 6)
    x[0, 0] = 1.0
    mean, deviation = part.ensemble(x)
    weight = part(x, Context()).softmax(-1)
    assert float(deviation[0, 0]) > 2 * float(deviation[0, 1])
    assert float(weight[0, 0]) < float(mean[0, 0])


def test_gradients_are_finite_where_all_passes_agree():
    part, x = scorer(), torch.zeros(5, 6, requires_grad=True)
    router = Router(SITE, {"score": "calibrated"}).train()
    part(x, Context()).square().sum().backward()
    assert part.weight.grad.isfinite().all()
    assert router(torch.zeros(0, 6))[0].shape == (0, 4)
    assert part(torch.randn(2, 6), Context()).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bank("quadratic"), "choose one of linear, vector"),
        (lambda: scorer(passes=1), "needs 2 or more"),
        (lambda: scorer(dropout=1.0), "dropout=1.0 of a router: give 0 to below 1"),
        (lambda: scorer(floor=0), "floor=0 of a calibrated router must be positive"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(OptionError, match=message):
        call()


def test_one_token():
    assert tiny(experts="modulated")(tokens(1, 1)).logits.isfinite().all()
