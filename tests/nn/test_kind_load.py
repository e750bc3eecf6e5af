"""The load-balancing loss where experts are of several kinds, and weights that leave some out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import leaks, lives, tiny, tokens

from moekit.contract import PAD, Context, Routing
from moekit.errors import OptionError
from moekit.nn.load import KindLoad, Load
from moekit.nn.parts import Site
from moekit.nn.seen import Seen
from moekit.nn.weighers import Scores

N, M = 3, 4
SITE = Site(hidden_size=4, intermediate_size=4, num_experts=N, choices=N + M, top_k=2)


def seen(expert_TK, logits_TE, sequence=None):
    expert = torch.as_tensor(expert_TK)
    routing = Routing(expert, (expert >= 0).float(), logits_TE)
    return Seen(torch.zeros(len(expert), 4), routing, None, None, Context(sequence=sequence))


def drawn(seed, tokens=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, N + M, generator=generator)
    expert = torch.stack([torch.randperm(N + M, generator=generator)[:2] for _ in range(tokens)])
    return expert, logits


@given(st.integers(0, 50), st.floats(0.1, 2))
def test_by_hand(seed, others):
    expert, logits = drawn(seed)
    f = torch.bincount(expert.flatten(), minlength=N + M) / expert.numel()
    p = logits.softmax(-1).mean(0)
    weighted = (N + M) * sum(float(f[i] * p[i]) * (1 if i < N else others) for i in range(N + M))
    assert float(KindLoad(SITE, others=others)(seen(expert, logits))) == pytest.approx(weighted, rel=1e-4)
    f[N:] = f[N:].mean()
    averaged = (N + M) * float((f * p).sum())
    assert float(KindLoad(SITE, average=True)(seen(expert, logits))) == pytest.approx(averaged, rel=1e-4)


@given(st.integers(0, 50), st.sampled_from(["sequence", "micro", "accumulated"]))
def test_alike_kinds_are_the_plain_loss(seed, scope):
    expert, logits = drawn(seed, 12)
    one = seen(expert, logits, torch.arange(3).repeat_interleave(4))
    torch.testing.assert_close(KindLoad(SITE, scope=scope)(one), Load(SITE, scope=scope)(one))


def test_shares_among_averaged_others_do_not_matter():
    logits = torch.randn(6, N + M)
    spread, piled = ([[0, 3], [1, 4], [2, 5], [0, 6], [1, 3], [2, 4]], [[i % 3, 3] for i in range(6)])
    values = [KindLoad(SITE, average=True)(seen(choice, logits)) for choice in (spread, piled)]
    torch.testing.assert_close(*values)
    plain = [Load(SITE)(seen(choice, logits)) for choice in (spread, piled)]
    assert not torch.allclose(*plain)


@pytest.mark.parametrize("tau", [0.25, 0.75])
def test_the_weighted_loss_is_least_where_the_others_take_1_over_tau(tau):
    own, other = KindLoad(SITE, others=tau).shares(torch.tensor([tau] * N + [1.0] * M))[[0, -1]]
    assert float(own) == pytest.approx(float(other))


def test_the_softmax_over_the_chosen():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0, 0, 0, 0], [0.0] * 7])
    one = seen([[1, 2], [PAD, PAD]], logits)
    share = torch.tensor([1.0, 2.0]).softmax(0) / 2
    wanted = (N + M) * 0.5 * float(share.sum())
    assert float(Load(SITE, probability="chosen")(one)) == pytest.approx(wanted)
    assert one.selected_TE[1].tolist() == [0] * 7


def test_weights_of_experts_with_weights_alone():
    scores = torch.tensor([[0.1, 0.2, 0.1, 0.3, 0.1, 0.1, 0.1]]).expand(3, 7)
    expert = torch.tensor([[0, 1, 3], [3, 4, PAD], [2, PAD, PAD]])
    weight = Scores(SITE, own=True)(scores, scores, expert, Context())
    assert weight.flatten().tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0, 0, 0, 1, 0, 0])
    raw = Scores(SITE, own=True, normalise=False)(scores, scores, expert, Context())
    assert raw.flatten().tolist() == pytest.approx([0.1, 0.2, 0, 0, 0, 0, 0.1, 0, 0])


def test_lives(tmp_path):
    balance = {"load": {"kind": "kind-load", "weight": 0.01, "others": 0.75, "average": True}}
    weigh = {"kind": "scores", "own": True}
    model = lives(tmp_path, router={"weigh": weigh}, others=["zero"] * 3, num_experts_per_tok=3, balance=balance)
    assert not leaks(model)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"kind": "kind-load", "others": 0}, "others=0 weighs the load of experts without weights"),
        ({"kind": "kind-load", "probability": "all"}, "probability='all' of a load-balancing loss: choose"),
        ({"kind": "kind-load", "scope": "world"}, "scope='world' of a load-balancing loss"),
    ],
)
def test_bad_options(term, message):
    with pytest.raises(OptionError, match=message):
        tiny(balance={"load": {"weight": 1.0, **term}})


def test_without_others_and_residuals_it_is_the_plain_model():
    recipe = {"weigh": {"kind": "scores", "normalise": False}}
    rich = tiny(router={**recipe, "score": "residual"}, others=["zero", "copy", "constant"])
    plain = tiny(router=recipe)
    for ours, theirs in zip(rich.model.layers, plain.model.layers, strict=True):
        ours.load_state_dict(theirs.state_dict(), strict=False)
        scorer = ours.mlp.gate.scorer
        scorer.scorer.weight.data[:4] = theirs.mlp.gate.scorer.weight
        if scorer.map is not None:
            torch.nn.init.zeros_(scorer.map.weight)
        ours.mlp.gate.pool = torch.arange(7) < 4
    rich.model.embed_tokens.load_state_dict(plain.model.embed_tokens.state_dict())
    torch.testing.assert_close(rich(tokens()).logits, plain(tokens()).logits)
