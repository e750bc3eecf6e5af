"""The gate that begins dense and ends sparse: Gumbel noise, a temperature, a threshold."""

import math
from itertools import pairwise

import pytest
import torch

from moekit.contract import PAD, Context
from moekit.errors import OptionError
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.nn.activations import GumbelSoftmax
from moekit.nn.config import Site
from moekit.nn.elastic import restricted
from moekit.nn.flow import begin
from moekit.nn.heads import HeadRouter
from moekit.nn.moment import Moment
from moekit.nn.schedule import Schedule
from moekit.nn.thresholds import Threshold

SITE = Site(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
SIZES = {"vocab_size": 40, "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 8, "num_hidden_layers": 2}
ROUTER = {
    "activation": {"kind": "gumbel-softmax", "temperature": 2.0},
    "select": {"kind": "threshold", "least": 1e-3, "most": 8},
    "weigh": {"kind": "scores", "normalise": False},
}
IDS = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(3))


def model(**options):
    torch.manual_seed(0)
    return MoekitForCausalLM(MoekitConfig(**SIZES, num_attention_heads=2, router=ROUTER, **options))


def test_no_noise_outside_training():
    logits, part = torch.randn(5, 4), GumbelSoftmax(SITE, temperature=0.5).eval()
    torch.testing.assert_close(part(logits, Context()), (logits / 0.5).softmax(-1))
    assert not torch.equal(part.train()(logits, Context()), part(logits, Context()))


def test_the_largest_is_drawn_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    drawn = GumbelSoftmax(SITE, temperature=0.7)(logits.expand(40000, 4), Context()).argmax(1)
    found = torch.bincount(drawn, minlength=4) / 40000
    torch.testing.assert_close(found, logits.softmax(0), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_barred_choices_stay_barred_and_scores_are_wide(dtype):
    logits = torch.tensor([[0.0, -math.inf, 3.0, 1.0]], dtype=dtype)
    for temperature in (0.01, 1.0, 100.0):
        scores = GumbelSoftmax(SITE, temperature=temperature)(logits, Context())
        assert scores.dtype == torch.float32
        assert scores[0, 1] == 0
        torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_threshold():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.05, 0.05], [0.9, 0.1, 0.0, 0.0]])
    assert Threshold(SITE, least=0.1)(scores, Context()).tolist() == [[0, 1, 2], [0, PAD, PAD], [0, PAD, PAD]]
    assert Threshold(SITE, least=0.1, most=1)(scores, Context()).tolist() == [[0], [0], [0]]
    assert Threshold(SITE, least=0.0)(scores, Context()).tolist()[2] == [0, 1, PAD, PAD]
    nothing = torch.full((2, 4), -math.inf)
    assert Threshold(SITE)(nothing, Context()).tolist() == [[PAD], [PAD]]
    assert Threshold(SITE)(torch.full((1, 4), math.nan), Context()).tolist() == [[0]]  # found out by its weight
    assert Threshold(SITE)(torch.zeros(0, 4), Context()).shape[0] == 0


def test_balance_terms_see_the_scores_that_were_drawn():
    lm = model(balance={"load": {"weight": 1.0, "probability": "scores"}}).train()
    noted = []
    lm.model.layers[0].mlp.gate.activation.register_forward_hook(lambda *call: noted.append(call[-1]))
    out = lm(IDS, labels=IDS)
    assert len(noted) == 1  # drawn once for ranking, weighing and balance
    out.loss.backward()
    assert lm.model.layers[0].mlp.gate.scorer.weight.grad.any()


def test_experts_in_use_fall_from_all_to_one_as_the_temperature_does():
    lm = model().train()
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.mlp.gate.scorer.weight.normal_()
    gates = "model.layers.*.mlp.gate."
    heat = {"kind": "exponential", "start": 30.0, "end": 0.02, "until": 0.9}
    most = {"kind": "steps", "values": [8, 1], "at": [0.9]}
    schedules = [Schedule(lm, gates + "activation.temperature", heat), Schedule(lm, gates + "selector.most", most)]
    active = []
    for step in range(0, 101, 10):
        for schedule in schedules:
            schedule.apply(Moment(step, 100))
        active.append(float(lm(IDS).expert_load[0].sum()) / IDS.numel())
    assert active[0] == 8
    assert all(later <= earlier + 0.3 for earlier, later in pairwise(active))
    assert active[8] < 1.2  # it is sparse before it is cut
    assert active[9:] == [1, 1]


def test_candidates_only():
    lm = model().train()
    with restricted(lm, experts=3):
        load = lm(IDS).expert_load[0]
    assert load[:3].all()
    assert not load[3:].any()


def test_bad_options():
    with pytest.raises(OptionError, match="most=9 of 4 experts: give 1 to 4"):
        Threshold(SITE, most=9)


def test_balance_terms_of_heads_see_the_scores_that_weighed():
    site = Site(hidden_size=8, intermediate_size=4, num_experts=6, top_k=2)
    told = {"activation": {"kind": "gumbel-softmax"}, "weigh": {"kind": "scores", "normalise": False}}
    heads, seen = HeadRouter(site, told, {"load": 0.01}, "heads").train(), []
    heads.balance["heads-load"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(0)
    heads.gate.scorer.initialise(0.5)
    x_TH = torch.randn(20, 8)
    routing = heads(x_TH, begin(2, 10, x_TH.device))
    assert torch.allclose(seen[0].scores_TE.gather(1, routing.expert), routing.weight)
