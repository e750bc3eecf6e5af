"""Attention heads and attention experts, stick-breaking weights: exact against plain attention and brute force."""

from types import SimpleNamespace

import pytest
import torch
from wholes import leaks, lives, padding_on_the_left_changes_nothing, tiny, tokens

from moekit.errors import OptionError
from moekit.nn.attention import Attention
from moekit.nn.attention_experts import AttentionExperts
from moekit.nn.flow import begin
from moekit.nn.heads import Heads
from moekit.nn.mixers import ATTENTIONS
from moekit.nn.selected_heads import SelectedHeads
from moekit.nn.stick_breaking import StickWeights, seen, stick_breaking

CONFIG = SimpleNamespace(
    hidden_size=16, head_dim=4, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=9,
    qk_norm=False, rms_norm_eps=1e-6, _attn_implementation="eager", rope_parameters=None,
)  # fmt: skip
HEADS = {
    "heads": {"kind": "heads", "k": 1, "shared": 2, "scaled": True, "balance": {"load": 0.01}},
    "raw heads": {"kind": "heads", "k": 2, "shared": 1},
    "no shared head": {"kind": "heads", "k": 2},
    "by query": {"kind": "heads", "k": 1, "shared": 2, "by": "query"},
    "experts": {"kind": "experts", "experts": 3, "k": 2, "heads": 2, "weights": "stick-breaking",
                "balance": {"load": 0.01}, "router": {"score": "mlp"}},
    "rotary experts": {"kind": "experts", "experts": 3, "k": 2, "weights": "softmax"},
    "selected": {"kind": "selected", "k": 2, "router": {"select": {"kind": "expert-choice", "share": 0.5, "most": 2}}},
    "sticks": {"kind": "softmax", "weights": "stick-breaking"},
}  # fmt: skip


def made(kind: type, config: SimpleNamespace = CONFIG, **options: object) -> Attention:
    torch.manual_seed(0)
    module = kind(config, 0, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def called(module: Attention, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    angle = torch.arange(hidden.shape[1])[None, :, None] * torch.tensor([1.0, 0.01]).repeat(2)
    position = (angle.cos().expand(len(hidden), -1, -1), angle.sin().expand(len(hidden), -1, -1))
    if mask is None:
        length = hidden.shape[1]
        mask = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)[None, None]
    context = begin(len(hidden), hidden.shape[1], hidden.device)
    with torch.no_grad():
        return module(hidden, context, position_embeddings=position, attention_mask=mask)


def test_all_heads_with_even_gates_are_plain_attention() -> None:
    plain, heads = made(Attention), made(Heads, k=2, shared=2, scaled=True)
    heads.load_state_dict(plain.state_dict(), strict=False)
    for part in (heads.shared_gate, heads.mix, heads.router.gate.scorer):
        torch.nn.init.zeros_(part.weight)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(called(heads, x), called(plain, x))


def test_a_head_that_is_not_chosen_adds_nothing() -> None:
    heads = made(Heads, k=1, shared=1)
    x = torch.randn(1, 5, 16)
    gate = heads.gates(x[0], begin(1, 5, x.device))
    assert gate.shape == (5, 4)
    assert ((gate[:, 1:] > 0).sum(1) == 1).all()
    assert (gate[:, 0] > 0).all()
    routed = heads.router.gate.score(x[0], begin(1, 5, x.device)).softmax(-1)
    mix, chosen = heads.mix(x[0]).softmax(-1), routed.max(1)
    torch.testing.assert_close(gate[:, 1:].sum(1), mix[:, 1] * chosen.values)
    torch.testing.assert_close(gate[:, 0], mix[:, 0])
    assert torch.equal(gate[:, 1:].argmax(1), chosen.indices)


@pytest.mark.parametrize("two_stage", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
def test_gates_of_two_shared_and_two_chosen_heads_by_hand(scaled: bool, two_stage: bool) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "num_attention_heads": 6})
    heads, x = made(Heads, config, k=2, shared=2, scaled=scaled, two_stage=two_stage), torch.randn(5, 16)
    with torch.no_grad():
        gate = heads.gates(x, begin(1, 5, x.device))
        routed, shared = heads.router.gate.score(x, begin(1, 5, x.device)).softmax(-1), heads.shared_gate(x).softmax(-1)
        mix = heads.mix(x).softmax(-1) if two_stage else torch.full((5, 2), 0.5)
    kept = routed * (routed >= routed.topk(2).values[:, 1:])
    if scaled:
        kept, shared, mix = 2 * kept / kept.sum(1, keepdim=True), 2 * shared, 2 * mix
    torch.testing.assert_close(gate, torch.cat((mix[:, :1] * shared, mix[:, 1:] * kept), dim=1))


def test_a_query_gates_by_its_norm_over_the_deviation_of_norms() -> None:
    """The gates are 1; what their gradient flows through are the softmax's scores."""
    heads, x = made(Heads, k=1, shared=2, by="query"), torch.randn(5, 16)
    heads.gates(x, begin(1, 5, x.device))[:, 2:].amax(1).sum().backward()
    found = heads.q_proj.weight.grad.clone()
    heads.q_proj.weight.grad = None
    norm = heads.q_proj(x).unflatten(-1, (4, 4)).norm(dim=-1)
    ((norm / norm.std(1, unbiased=False, keepdim=True))[:, 2:].softmax(1).amax(1)).sum().backward()
    torch.testing.assert_close(found, heads.q_proj.weight.grad)


def test_heads_by_query_take_the_longest_queries_with_gates_of_one() -> None:
    heads = made(Heads, k=1, shared=2, by="query")
    x = torch.randn(1, 7, 16)
    gate = heads.gates(x[0], begin(1, 7, x.device))
    norm = heads.q_proj(x[0]).unflatten(-1, (4, 4)).norm(dim=-1)[:, 2:]
    assert torch.equal(gate[:, 2:].argmax(1), norm.argmax(1))
    torch.testing.assert_close(gate.sort(1).values, torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(7, -1))
    gate[:, 2:].amax(1).sum().backward()
    assert bool((heads.q_proj.weight.grad != 0).any())


def test_one_attention_expert_is_plain_attention() -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "num_key_value_heads": 4})
    plain = made(Attention, config)
    expert = made(AttentionExperts, config, experts=1, k=1, heads=4)
    state = {
        name: t[None] if name in ("q_proj.weight", "o_proj.weight") else t for name, t in plain.state_dict().items()
    }
    expert.load_state_dict(state, strict=False)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(called(expert, x), called(plain, x))


@pytest.mark.parametrize("weights", ["softmax", "stick-breaking"])
def test_attention_experts_equal_brute_force(weights: str) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "num_key_value_heads": 2, "num_attention_heads": 2})
    experts = made(AttentionExperts, config, experts=3, k=2, heads=2, weights=weights)
    x = torch.randn(2, 6, 16)
    context = begin(2, 6, x.device)
    weight = experts.router(x.reshape(-1, 16), context).dense(3).view(2, 6, 3)
    expected = torch.zeros_like(x)
    for number in range(3):
        one = made(Attention, config, weights=weights)
        own = {"q_proj.weight": experts.q_proj.weight[number], "o_proj.weight": experts.o_proj.weight[number]}
        own |= {"k_proj.weight": experts.k_proj.weight, "v_proj.weight": experts.v_proj.weight}
        one.load_state_dict(own)
        expected += called(one, x) * weight[..., number, None]
    torch.testing.assert_close(called(experts, x), expected)


def test_selected_heads_equal_attention_over_their_own_tokens_alone() -> None:
    module = made(SelectedHeads, k=2)
    x = torch.randn(1, 9, 16)
    gate = module.router(x[0], begin(1, 9, x.device)).dense(4)
    plain = made(Attention)
    plain.load_state_dict(module.state_dict(), strict=False)
    expected = torch.zeros(9, 16)
    for head in range(4):
        own = torch.where(gate[:, head] > 0)[0]
        assert 0 < len(own) < 9
        plain.o_proj.weight.data = torch.zeros(16, 16)
        plain.o_proj.weight.data[:, head * 4 : head * 4 + 4] = module.o_proj.weight[:, head * 4 : head * 4 + 4]
        expected[own] += called(plain, x[:, own])[0] * gate[own, head, None]
    torch.testing.assert_close(called(module, x)[0], expected)


def test_selected_heads_that_take_every_token_are_plain_attention() -> None:
    every = {"select": {"kind": "expert-choice", "share": 1.0}, "weigh": "ones"}
    module, plain = made(SelectedHeads, k=4, router=every), made(Attention)
    plain.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(called(module, x), called(plain, x), rtol=1e-5, atol=1e-6)


def test_selected_heads_refuse_scaled_positions() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(OptionError, match="selected heads count their own places, and know no rope_type 'linear'"):
        tiny(attention=HEADS["selected"], rope_parameters=scaled)


def sticks(score: torch.Tensor) -> torch.Tensor:
    """Stick-breaking weights, keys in the order of the text."""
    score = score.masked_fill(~seen(None, *score.shape[-2:], score.device), -torch.inf)
    return StickWeights.apply(score.flip(-1)).flip(-1)


def test_stick_weights_equal_their_definition() -> None:
    score = torch.randn(2, 3, 5, 5)
    weight = sticks(score)
    share = score.sigmoid()
    for row in range(5):
        left = torch.ones(2, 3)
        for column in range(row, -1, -1):
            torch.testing.assert_close(weight[:, :, row, column], share[:, :, row, column] * left)
            left = left * (1 - share[:, :, row, column])
    assert (weight.sum(-1) <= 1 + 1e-6).all()
    assert (weight.triu(1) == 0).all()


def test_stick_weights_have_the_gradient_of_their_definition() -> None:
    score = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sticks, (score,))
    assert torch.autograd.gradcheck(sticks, (torch.randn(1, 2, 2, 5, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])])
def test_long_texts_in_parts_give_the_same_and_the_same_gradients(mask, monkeypatch) -> None:
    query = torch.randn(2, 4, 7, 8, requires_grad=True)  # two keys stand before the first query
    key, value = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(2))
    found = []
    for most in (7, 3):
        monkeypatch.setattr("moekit.nn.stick_breaking.QUERIES", most)
        out, _ = stick_breaking(None, query, key, value, mask, scaling=0.4)
        found.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


def test_stick_weights_stay_finite_where_scores_are_extreme() -> None:
    score = torch.full((1, 1, 4, 4), 300.0).requires_grad_()
    weight = sticks(score)
    torch.testing.assert_close(weight[0, 0], torch.eye(4))
    weight.sum().backward()
    assert score.grad.isfinite().all()


def test_every_kind_of_mask_says_the_same() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    padded = causal & torch.tensor([False, True, True, True])
    additive = torch.zeros(1, 1, 4, 4).masked_fill(~padded, torch.finfo(torch.float32).min)
    assert torch.equal(seen(None, 4, 4, causal.device), causal)
    assert torch.equal(seen(None, 1, 4, causal.device), causal[3:])
    for mask in (padded[None, None], additive, torch.tensor([[0, 1, 1, 1]])):
        assert torch.equal(seen(mask, 4, 4, causal.device)[0, 0], padded)


@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS)
def test_lives_in_a_model(kind: dict, tmp_path) -> None:
    model = lives(tmp_path, attention=kind, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2)
    assert not leaks(model)
    if kind.get("balance"):
        ids = tokens()
        assert "attention-load" in model.train()(ids, labels=ids).losses


@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS)
def test_padding_on_the_left_changes_nothing(kind: dict) -> None:
    padding_on_the_left_changes_nothing(tiny(attention=kind, num_attention_heads=4))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "heads", "k": 1, "shared": 4}, "4 shared of 4 attention heads: leave one to be routed at least"),
        ({"kind": "heads", "k": 3, "shared": 2}, "k=3 of 2 routed attention heads: give 1 to 2"),
        ({"kind": "heads", "k": 1, "by": "key"}, "heads chosen by 'key': choose learnt or query"),
        ({"kind": "experts", "experts": 2, "k": 0}, "k=0 of 2 routed attention heads: give 1 to 2"),
        ({"kind": "softmax", "weights": "linear"}, "attention weights 'linear': choose one of softmax, stick-breaking"),
        ({"kind": "heads"}, "attention 'heads' needs the option 'k'"),
        ({"kind": "none"}, f"attention 'none' is not known: choose one of {', '.join(sorted(ATTENTIONS))}"),
    ],
)
def test_bad_options_are_one_line(options: dict, told: str) -> None:
    with pytest.raises(OptionError) as error:
        tiny(attention=options)
    assert str(error.value) == told
