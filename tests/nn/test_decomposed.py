"""n^2 experts of two halves, against every one of them computed for itself."""

import pytest
import torch
from wholes import leaks, lives, tiny, tokens

from moekit.errors import OptionError
from moekit.nn.decomposed import Decomposed, HalvesRouter, squared_relu
from moekit.nn.flow import begin, carry

OPTIONS = {"kind": "decomposed", "sides": 4, "heads": 2, "keep": 2, "width": 6}


def layer(split: str, **options: object) -> Decomposed:
    mlp = tiny(feed_forward={**OPTIONS, "split": split, **options}).model.layers[0].mlp
    for parameter in (mlp.up_bias, mlp.down_bias):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return mlp


def expert(mlp: Decomposed, i: int, j: int, x: torch.Tensor) -> torch.Tensor:
    """E_ij(x) as the paper defines it."""
    if not mlp.vertical:
        return mlp.down[0, 0, j] @ squared_relu(mlp.up[0, i] @ x) + mlp.down_bias[0, j]
    first = squared_relu(mlp.up[0, i] @ x + mlp.up_bias[0, i])
    second = squared_relu(mlp.up[1, j] @ x + mlp.up_bias[1, j])
    upper = mlp.down[0, 0, i] @ first + mlp.down[0, 1, i] @ second + mlp.down_bias[0, i]
    lower = mlp.down[1, 0, j] @ first + mlp.down[1, 1, j] @ second + mlp.down_bias[1, j]
    return torch.cat((upper, lower))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("split", ["vertical", "horizontal"])
def test_factorised_equals_every_expert(split: str, masked: bool) -> None:
    mlp = layer(split)
    x = torch.randn(6, 32)
    if masked:
        mlp.mask = torch.rand(4, 4) > 0.4
    first, second = mlp.router(x)
    expected = torch.zeros(6, 32)
    for token in range(6):
        for i in range(4):
            for j in range(4):
                weight = (first[token, :, i] * second[token, :, j]).sum()
                if not masked or mlp.mask[i, j]:
                    expected[token] += weight * expert(mlp, i, j, x[token])
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
    mlp.mask = None if masked else torch.ones(4, 4, dtype=torch.bool)
    if not masked:
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_a_head_keeps_what_lies_above_the_quantile() -> None:
    router = HalvesRouter(8, 16, 3, 4).eval()
    x = 3 * torch.randn(200, 8)
    first, _ = router(x)
    torch.testing.assert_close(first.sum(-1), torch.ones(200, 3))
    logits = router.first(x).view(200, 3, 16)
    normed = router.norms[0](logits)
    limit = normed.amax(-1, keepdim=True).clamp(max=router.threshold)
    assert torch.equal(first > 0, normed >= limit)
    kept = logits.masked_fill(normed < limit, -torch.inf)
    torch.testing.assert_close(first, kept.softmax(-1))
    router.train()
    assert router(x)[0].gt(0).sum(-1).float().mean().item() == pytest.approx(4, abs=1)


def test_one_router_serves_its_group(tmp_path) -> None:
    model = lives(tmp_path, feed_forward={**OPTIONS, "every": 2}, num_hidden_layers=4, idle=("bias",))
    assert [layer.mlp.router is not None for layer in model.model.layers] == [True, False, True, False]
    assert not leaks(model)
    ids = tokens()
    losses = model.train()(ids, labels=ids).losses
    assert set(losses) == {"uniformity", "ambiguity"}
    with pytest.raises(OptionError, match="a decomposed layer borrows the router of layer 0, which has none"):
        tiny(feed_forward=["moe", {**OPTIONS, "every": 2}])(ids)


@pytest.mark.parametrize("split", ["vertical", "horizontal"])
def test_lives_in_a_model(split: str, tmp_path) -> None:
    lives(tmp_path, feed_forward={**OPTIONS, "split": split}, idle=("bias",))


def test_padding_leaves_no_trace() -> None:
    ids, found = tokens(), []
    long = torch.cat((ids, torch.zeros(2, 5, dtype=torch.int64)), dim=1)
    for rows in (ids, long):
        model = tiny(feed_forward=OPTIONS).train()
        mask = (torch.arange(rows.shape[1]) < 12).expand(2, -1).long()
        out = model(rows, attention_mask=mask)
        norms = [norm.running_mean for norm in model.model.layers[0].mlp.router.norms]
        found.append((out.logits[:, :12], *norms, *out.expert_load, out.losses["uniformity"]))
    for short, padded in zip(*found, strict=True):
        torch.testing.assert_close(short, padded)


def test_statistics_stay_in_float32_in_half_precision(tmp_path) -> None:
    model = tiny(feed_forward=OPTIONS).train()
    model(tokens())
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for own, other in zip(*(m.model.layers[0].mlp.router.norms for m in (model, half)), strict=True):
        assert torch.equal(own.running_var, other.running_var)
    assert half.train()(tokens(), labels=tokens()).loss.isfinite()


def test_losses_at_their_ends() -> None:
    mlp = layer("vertical", uniformity=1.0, ambiguity=1.0)

    def lost(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
        context = begin(1, len(first), first.device)
        mlp._lose(first, second, context)
        return {name: value.item() for name, value in carry(context).losses.items()}

    sure = torch.eye(4).repeat(2, 1)[:, None].expand(-1, 2, -1)
    assert lost(sure, sure) == pytest.approx({"uniformity": 1.3862944, "ambiguity": 0.0})
    even = torch.full((8, 2, 4), 0.25)
    assert lost(even, even) == pytest.approx({"uniformity": 1.3862944, "ambiguity": 0.75})
    assert lost(sure[:1].clamp(min=1e-3), even[:1])["uniformity"] > 2


def test_edges() -> None:
    mlp = layer("vertical").train()
    assert mlp(torch.zeros(0, 32)).shape == (0, 32)
    assert mlp(torch.zeros(1, 32)).isfinite().all()
    assert mlp(torch.zeros(5, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": 4}, "sides=4, heads=2, width=6, every=1: 1 or more, and keep below sides"),
        ({"split": "diagonal"}, "split='diagonal' of experts: choose vertical or horizontal"),
        ({"width": 5}, "a vertical split halves width=5 and the hidden size 32: make them even"),
    ],
)
def test_bad_options_are_one_line(options: dict, told: str) -> None:
    with pytest.raises(OptionError) as error:
        tiny(feed_forward={**OPTIONS, **options})
    assert str(error.value) == told
