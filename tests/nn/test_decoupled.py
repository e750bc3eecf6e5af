"""Weights apart from selection, and a router that may be told the task."""

import pytest
import torch
from wholes import lives, tiny, tokens

from moekit.contract import PAD, Context, Routing
from moekit.errors import OptionError
from moekit.nn import MoE, Router, Seen, Site, Standalone
from moekit.nn.balance import Load
from moekit.nn.decoupled import Decoupled
from moekit.nn.experts import Experts
from moekit.nn.task_aware import TaskAware

SITE = Site(hidden_size=6, intermediate_size=5, num_experts=4, top_k=2)
NORMAL = {"kind": "scores", "normalise": False}


def router(weigh, seed=0, **parts):
    torch.manual_seed(seed)
    made = Router(SITE, {"weigh": weigh, **parts})
    for part in (made.scorer, made.weigher):
        if hasattr(part, "initialise"):
            part.initialise(0.5)
    return made


def test_weights_are_scores_plus_scale_and_choices_are_the_plain_ones():
    made, x = router("decoupled"), torch.randn(9, 6)
    logits, weight, expert = made(x)
    scores = logits.softmax(-1)
    assert torch.equal(expert, scores.topk(2).indices)
    assert torch.allclose(weight, (scores + x @ made.weigher.weight.T).gather(1, expert), atol=1e-6)
    assert bool((weight < 0).any())  # unbounded, as the paper has it
    joint = router({"kind": "decoupled", "joint": True})
    logits, weight, expert = joint(x)
    scores = logits.softmax(-1)
    full = (torch.cat((x, scores), 1) @ joint.weigher.weight.T).softmax(-1)
    assert torch.allclose(weight, full.gather(1, expert), atol=1e-6)


def test_a_zero_start_is_the_plain_router():
    x = torch.randn(9, 6)
    plain, zero = router(NORMAL), router({"kind": "decoupled", "start": "zero"})
    for a, b in zip(plain(x), zero(x), strict=True):
        assert torch.equal(a, b)


def test_lecun_start_has_the_deviation_of_its_inputs():
    torch.manual_seed(1)
    part = Decoupled(Site(hidden_size=400, intermediate_size=5, num_experts=50))
    part.initialise(0.02)
    assert abs(float(part.weight.std()) - 400**-0.5) < 1e-3


def test_balance_does_not_reach_the_scale():
    made, x = router("decoupled"), torch.randn(9, 6)
    context = Context()
    logits, weight, expert = made(x, context)
    Load(SITE)(Seen(x, Routing(expert, weight, logits), made, None, context)).backward()
    assert made.weigher.weight.grad is None
    assert bool((made.scorer.weight.grad != 0).any())


def test_unused_slots_have_no_weight():
    part, x = Decoupled(SITE), torch.randn(3, 6)
    part.initialise(1.0)
    expert = torch.tensor([[0, PAD], [PAD, PAD], [2, 1]])
    weight = part(torch.zeros(3, 4), torch.full((3, 4), 0.25), expert, Context(extra={"hidden": x}))
    assert bool((weight[expert == PAD] == 0).all())
    assert part(torch.zeros(0, 4), torch.zeros(0, 4), expert[:0], Context(extra={"hidden": x[:0]})).shape == (0, 2)


def test_gap_of_an_upcycled_layer_is_what_the_weights_lack():
    """All experts equal one dense layer: the output is that layer times the sum of weights, which is not 1."""
    made, x = router("decoupled"), torch.randn(9, 6)
    experts = Experts(Standalone(), SITE)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter[0]).expand_as(parameter))
        layer = MoE(made, experts)
        dense = experts(x, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
        total = made(x)[1].sum(1, keepdim=True)
        assert torch.allclose(layer(x), dense * total, atol=1e-5)
    assert float((total - 1).abs().max()) > 0.1


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"start": "zero"}])
def test_in_a_model(tmp_path, options):
    lives(tmp_path, router={"weigh": {"kind": "decoupled", **options}})


def test_a_task_moves_the_logits_and_none_is_a_zero_vector():
    torch.manual_seed(2)
    part, x = TaskAware(SITE, tasks=3, width=4), torch.randn(5, 6)
    part.initialise(0.5)
    part.eval()
    normed = torch.nn.functional.layer_norm(x, (6,))
    assert torch.allclose(part(x, Context()), normed @ part.weight[:, :6].T, atol=1e-6)
    task = torch.tensor([0, 1, 2, 0, 1])
    expected = torch.cat((normed, part.embedding.weight[task]), 1) @ part.weight.T
    assert torch.allclose(part(x, Context(task=task)), expected, atol=1e-6)


def test_tasks_are_hidden_as_often_as_asked_while_training():
    torch.manual_seed(3)
    part = TaskAware(SITE, tasks=2, hidden=0.25).train()
    part.initialise(1.0)
    x, task = torch.randn(1, 6).expand(4000, 6), torch.ones(4000, dtype=torch.int64)
    blind = (part(x, Context(task=task)) - part(x, Context())).abs().amax(1) < 1e-6
    assert abs(float(blind.float().mean()) - 0.25) < 0.03
    part.hidden = 1.0
    assert torch.allclose(part(x, Context(task=task)), part(x, Context()))


def test_tasks_in_a_model(tmp_path):
    lives(
        tmp_path,
        router={"score": {"kind": "task-aware", "tasks": 2, "hidden": 0.0}},
        inputs={"task_ids": torch.arange(24).reshape(2, 12) % 2},
    )


def test_what_is_wrong_is_told():
    with pytest.raises(OptionError, match="choose one of lecun, zero"):
        Decoupled(SITE, start="one")
    with pytest.raises(OptionError, match="run the whole router"):
        Decoupled(SITE)(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64), Context())
    with pytest.raises(OptionError, match="needs tasks >= 1"):
        TaskAware(SITE, tasks=0)
    model = tiny(router={"score": {"kind": "task-aware", "tasks": 2}})
    with pytest.raises(OptionError, match="task_ids from 0 to 2: there are 2 of them, 0 to 1"):
        model(tokens(1, 2), task_ids=torch.tensor([[0, 2]]))
