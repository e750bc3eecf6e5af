"""Slices of a dense layer: exact with all and a zero router, balanced by the snake, written and loaded again."""

import pytest
import torch
from building import dense, logits, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moekit.build import Material, build
from moekit.build._dense import dense_layers
from moekit.build._split import SplitFFN, snake, unit_scores
from moekit.build.sparse_unified import SparseUnified
from moekit.errors import MoekitError, OptionError

MATERIAL = Material(rows=rows(), batch_size=4)


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**31))
def test_the_snake_deals_every_unit_once_and_evenly(experts, rounds, shared, seed):
    scores = torch.rand(experts * rounds + shared, generator=torch.Generator().manual_seed(seed)).double()
    own, units = snake(scores, experts, shared)
    assert sorted([*own.tolist(), *units.flatten().tolist()]) == list(range(len(scores)))
    assert units.shape == (experts, rounds)
    if shared and rounds:
        assert scores[own].min() >= scores[units].max()


def test_the_snake_balances_better_than_slices_in_order():
    scores = torch.rand(256, generator=torch.Generator().manual_seed(0)).double() ** 4
    order = scores.sort(descending=True).indices
    dealt, contiguous = scores[snake(scores, 8)[1]].sum(1), scores[order.view(8, 32)].sum(1)
    assert dealt.max() / dealt.min() < 1.05 < contiguous.max() / contiguous.min()
    assert snake(torch.ones(4), 2)[1].tolist() == [[0, 3], [1, 2]]  # ties to the lower unit


@pytest.mark.parametrize("shared", [0.0, 0.25])
def test_all_slices_and_a_zero_router_are_the_layer(shared):
    """The sheet's identity, to 1e-6; the sum of slices, not their mean."""
    model = dense()
    before = logits(model)
    method = SparseUnified(experts=8, top_k=8, shared=shared)
    names = method.split(model, dense_layers(model), rows())
    assert all(isinstance(model.get_submodule(name), SplitFFN) for name in names)
    assert (logits(model) - before).abs().max() <= 1e-6 * before.abs().max() + 1e-6


def test_scores_by_hand():
    model = dense()
    layers = dense_layers(model)
    seen = []
    hook = layers[1].module.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    found, by_norm = (unit_scores(model, layers, rows(3), norm=norm)[1] for norm in (False, True))
    hook.remove()
    hidden, down = torch.cat(seen[:3]), layers[1].weights.down
    assert torch.allclose(found, (hidden * down.mean(0)).abs().mean(0).double(), rtol=1e-4)
    assert torch.allclose(by_norm, hidden.abs().mean(0).double() * down.norm(dim=0), rtol=1e-4)


def test_the_weights_are_one_plus_the_logits():
    model = dense()
    (name,) = SparseUnified(experts=4, top_k=1, noise=0.5).split(model, dense_layers(model)[1:2], rows())
    layer, x = model.get_submodule(name), torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))
    logit, best = (x[0, 0] @ layer.router.weight.T).max(0)
    gate, up = (layer.gate_up_proj[best] @ x[0, 0]).chunk(2)
    by_hand = (1 + logit) * (layer.down_proj[best] @ (torch.nn.functional.silu(gate) * up))
    assert torch.allclose(layer(x)[0, 0], by_hand, atol=1e-5)


def test_frozen_tuning_moves_routers_alone():
    model = dense()
    built = SparseUnified(experts=8, top_k=4, ends=False, frozen_steps=2, steps=0).build(model, MATERIAL)
    fresh = dense()
    SparseUnified(experts=8, top_k=4, ends=False).split(fresh, dense_layers(fresh), rows())
    for (name, now), (_, then) in zip(built.model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(now, then) is ("router" not in name), name
    assert "all" not in built.report
    assert built.report["difference_after_splitting"] > 0


def test_written_in_moekits_own_format_it_computes_the_same(folder, tmp_path):
    method = SparseUnified(experts=8, top_k=4, frozen_steps=2, steps=2, kl=0.5)
    built = build(folder, method, MATERIAL, tmp_path / "out")
    assert built.report["format"] == "moekit"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(built.model), atol=1e-5)
    assert sum(type(m).__name__ == "BankExperts" for m in loaded.modules()) == 1  # the outer two stay dense


def test_the_noise_alone_breaks_the_tie():
    """With a router of zeros the same experts would always be chosen, and the others never trained."""
    chosen = []
    for noise in (0.0, 1e-3):
        model = dense()
        (name,) = SparseUnified(experts=8, top_k=2, noise=noise).split(model, dense_layers(model)[1:2], rows())
        x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
        chosen.append(len(model.get_submodule(name).router(x)[2].unique()))
    assert chosen[0] == 2
    assert chosen[1] > 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseUnified(experts=4, top_k=5), "top_k=5 of 4 experts is not possible"),
        (lambda: SparseUnified(shared=1.0), "shared=1 is a share"),
        (lambda: SparseUnified(steps=-1), "0 leaves a stage out"),
        (lambda: SparseUnified(experts=5, top_k=2).build(dense(), MATERIAL), "cannot be dealt evenly to 5 experts"),
        (lambda: SparseUnified(experts=8, top_k=4).build(dense(num_hidden_layers=2), MATERIAL), "ends=false"),
        (lambda: SparseUnified().build(dense(), Material()), "trains on text: give --text"),
        (
            lambda: snake(torch.ones(4), 4, 4),
            "4 hidden units less 4 shared ones cannot be dealt",
        ),
    ],
)
def test_what_is_not_possible(make, message):
    with pytest.raises(MoekitError, match=message):
        make()


def test_no_stock_checkpoint_holds_it(folder, tmp_path):
    method = SparseUnified(experts=8, top_k=4, frozen_steps=1, steps=0)
    with pytest.raises(OptionError, match=r"weighted by 1 \+ logit.*give --format moekit"):
        build(folder, method, MATERIAL, tmp_path / "out", format="stock")
    shared = SparseUnified(experts=8, top_k=4, shared=0.25, frozen_steps=1, steps=0)
    with pytest.raises(OptionError, match="a shared slice with a gate of its own has no place"):
        build(folder, shared, MATERIAL, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
