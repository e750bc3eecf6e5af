"""The recurrence and its gradients, projections per modality, mixers side by side, parallel blocks."""

import pytest
import torch
from transformers import DynamicCache
from wholes import leaks, lives, padding_on_the_left_changes_nothing, tiny, tokens

from moekit.errors import OptionError
from moekit.nn.flow import begin
from moekit.nn.scan import scan
from moekit.nn.state_space import SPLIT, StateSpace

OWN = {"kind": "state-space", "state": 4, "modalities": 2}
PARALLEL = {"block": {"kind": "parallel", "attention": 1.0, "feed_forward": 0.5}}


def test_the_scan_and_its_gradients() -> None:
    decay = torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True)
    entry = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    state, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for step in range(5):
        state = decay[:, step] * state + entry[:, step]
        expected.append(state)
    torch.testing.assert_close(scan(decay, entry), torch.stack(expected, dim=1))
    assert torch.autograd.gradcheck(scan, (decay, entry))
    assert scan(decay[:, :0], entry[:, :0]).shape == (2, 0, 3)


def plain(layer: StateSpace, x: torch.Tensor) -> torch.Tensor:
    """One sequence [S, H], position by position (Mamba, algorithm 2)."""
    inner = layer.D.shape[0]
    u, gate = (x @ layer.in_proj.weight[0].T).split(inner, dim=-1)
    window = torch.cat((torch.zeros(3, inner), u))
    mixed = [(window[t : t + 4] * layer.conv.weight[:, 0].T).sum(0) + layer.conv.bias for t in range(len(x))]
    u = torch.nn.functional.silu(torch.stack(mixed))
    rank, b, c = (u @ layer.x_proj.weight[0].T).split((layer.rank, 4, 4), dim=-1)
    dt = torch.nn.functional.softplus(rank @ layer.dt_proj.weight[0].T + layer.dt_proj.bias[0])
    state, out = torch.zeros(inner, 4), []
    for t in range(len(x)):
        state = (dt[t][:, None] * -layer.A_log.exp()).exp() * state + (dt[t] * u[t])[:, None] * b[t]
        out.append(state @ c[t] + layer.D * u[t])
    return (torch.stack(out) * torch.nn.functional.silu(gate)) @ layer.out_proj.weight[0].T


def made(**options: object) -> StateSpace:
    return tiny(attention={"kind": "state-space", "state": 4, **options}).model.layers[0].self_attn


def test_a_state_space_layer_equals_its_recurrence() -> None:
    layer = made()
    x = torch.randn(2, 7, 32)
    out = layer(x, begin(2, 7, x.device))
    torch.testing.assert_close(out, torch.stack([plain(layer, row) for row in x]), rtol=1e-4, atol=1e-5)


def test_the_window_begins_as_in_mamba() -> None:
    """Uniform over one over the root of its width, whatever deviation the model's other weights begin with."""
    layer = made(kernel=4)
    window, dt = layer.conv.weight.detach(), torch.nn.functional.softplus(layer.dt_proj.bias.detach())
    assert 0.45 < float(window.abs().max()) <= 0.5
    assert float(window.std()) == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert 1e-3 * 0.99 < float(dt.min()) < float(dt.max()) < 1e-1 * 1.01


def modality(*ids: int) -> torch.Tensor:
    return torch.tensor(ids)


def test_equal_copies_are_one_layer() -> None:
    one, two = made(), made(modalities=2)
    state = {name: t.expand(2, *t.shape[1:]) if "proj" in name else t for name, t in one.state_dict().items()}
    two.load_state_dict(state)
    x = torch.randn(1, 6, 32)
    mixed = begin(1, 6, x.device, modality=modality(0, 1, 1, 0, 1, 0))
    torch.testing.assert_close(two(x, mixed), one(x, begin(1, 6, x.device)))


@pytest.mark.parametrize("name", SPLIT)
def test_only_what_is_split_differs_by_modality(name: str) -> None:
    layer = made(modalities=2, split=[name])
    sizes = {part: len(getattr(layer, f"{part}_proj").weight) for part in SPLIT}
    assert sizes == {part: 2 if part == name else 1 for part in SPLIT}
    x = torch.randn(1, 4, 32)
    outs = [
        layer(x, begin(1, 4, x.device, modality=modality(*ids))) for ids in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 1))
    ]
    assert not torch.allclose(outs[0], outs[1])
    torch.testing.assert_close(outs[0][:, :3], outs[2][:, :3])


def test_lives_in_a_model(tmp_path) -> None:
    model = lives(tmp_path, attention={"kind": "state-space", "state": 4})
    assert not leaks(model)
    ids = tokens()
    lives(tmp_path / "two", attention=OWN, inputs={"modality_ids": (ids > 20).long()})


def test_padding_on_the_left_leaves_the_state_alone() -> None:
    padding_on_the_left_changes_nothing(tiny(attention={"kind": "state-space", "state": 4}))


def test_modalities_must_be_known() -> None:
    model, ids = tiny(attention=OWN), tokens(1, 3)
    with pytest.raises(OptionError, match="routing by modality needs modality_ids with the input"):
        model(ids)
    with pytest.raises(OptionError, match="modality_ids from 0 to 2: there are 2 of them, 0 to 1"):
        model(ids, modality_ids=torch.tensor([[0, 1, 2]]))
    with pytest.raises(OptionError, match="modality is told of 2 tokens, and there are 3: tell all"):
        model(ids, modality_ids=torch.tensor([[0, 1]]))


def test_modalities_by_vocabulary() -> None:
    model, ids = tiny(attention=OWN, modality_starts=[13]), torch.tensor([[0, 12, 13, 39]])
    torch.testing.assert_close(model(ids).logits, model(ids, modality_ids=torch.tensor([[0, 0, 1, 1]])).logits)
    assert not torch.equal(model(ids).logits, model(ids, modality_ids=torch.tensor([[0, 1, 1, 1]])).logits)


def test_the_text_must_be_whole() -> None:
    model = tiny(attention="state-space")
    with pytest.raises(OptionError, match="a part of this model needs all of the text: run it without past_key_values"):
        model(tokens(), past_key_values=DynamicCache())


def test_mixers_side_by_side_and_parallel_blocks(tmp_path) -> None:
    both = {"kind": "sum", "of": ["state-space", "softmax"], "gates": [1.0, 0.15]}
    feed_forward = ["moe", "nothing"]
    model = lives(
        tmp_path, attention=[both, "state-space"], feed_forward=feed_forward, idle=("block.gate",), **PARALLEL
    )
    assert not leaks(model)
    assert isinstance(model.model.layers[0].input_layernorm, torch.nn.Identity)
    layer = tiny(**PARALLEL).model.layers[0]
    x, context = torch.randn(1, 3, 32), begin(1, 3, torch.device("cpu"))
    attend = torch.nn.Linear(32, 32)
    expected = layer.post_attention_layernorm(x + attend(x) + 0.5 * layer.mlp(x, context))
    torch.testing.assert_close(layer.block(x, layer, attend, context), expected)


def test_two_mixers_with_keys_and_values_are_run_anew() -> None:
    model = tiny(attention={"kind": "sum", "of": ["softmax", {"kind": "softmax", "window": 4}], "gates": [1.0, 0.5]})
    assert not model.model.can_cache
    assert tiny(attention={"kind": "sum", "of": ["softmax"], "gates": [1.0]}).model.can_cache
    torch.testing.assert_close(model(tokens()).logits, model(tokens(), use_cache=False).logits)
    found = model.generate(tokens(1, 6), max_new_tokens=4, do_sample=False)
    for end in range(6, 10):
        assert model(found[:, :end], use_cache=False).logits[0, -1].argmax() == found[0, end]


def test_a_sum_of_one_mixer_is_that_mixer() -> None:
    alone = tiny(attention="softmax")
    summed = tiny(attention={"kind": "sum", "of": ["softmax"], "gates": [1.0]})
    state = {name.replace("self_attn.", "self_attn.mixers.0."): t for name, t in alone.state_dict().items()}
    summed.load_state_dict(state, strict=False)
    torch.testing.assert_close(summed(tokens()).logits, alone(tokens()).logits)


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        ({"kind": "state-space", "state": 0},
         "a state-space layer needs state, expand, kernel, rank and modalities of 1 or more"),
        ({"kind": "state-space", "split": ["conv"]}, "split names 'conv': choose among in, x, dt, out"),
        ({"kind": "sum", "of": ["softmax"], "gates": []},
         "a sum of 1 mixers with 0 gates: give one gate for each, one at least"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(attention: dict, told: str) -> None:
    with pytest.raises(OptionError) as error:
        tiny(attention=attention)
    assert str(error.value) == told
