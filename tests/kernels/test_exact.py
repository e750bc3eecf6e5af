"""The experts implementation "moekit" against the oracle: every flag, dtype, size and degenerate routing."""

from __future__ import annotations

import pytest
import torch
from expert_modules import ALL_FLAGS, EXPERTS, HIDDEN, SLOTS, Flags, batch, make
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.contract import PAD, Routing, weighted_sum
from moekit.formats import DenseBank, PackedBank
from moekit.kernels import forward, run
from moekit.kernels._layer import Layer
from moekit.kernels._plan import Plan
from moekit.kernels.reference import reference, reference_slots

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check(module, x, index, weights, dtype):
    expected = reference(Layer.of_module(module.double()), x.double(), index, weights.double())
    module.to(dtype)
    with torch.no_grad():
        got = module(x, index, weights)
    assert got.dtype == dtype
    assert got.shape == x.shape
    error = (got.double() - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm() + 1e-12
    return got


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("flags", ALL_FLAGS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 9, 80])
def test_equals_the_oracle(flags, dtype, tokens):
    check(make(flags, dtype), *batch(tokens, dtype=dtype), dtype)


@pytest.mark.parametrize("flags", [Flags(), Flags(transposed=True, bias=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_ragged_tiles(flags, dtype):
    """Rows enough for every way the product is computed, and matrices that the conversion tile does not divide."""
    module = make(flags, dtype, experts=2, hidden=1030, inner=333)
    for tokens in (1, 2, 5, 40, 200):
        check(module, *batch(tokens, 2, 1, 1030, dtype), dtype)


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 12),
    slots=st.integers(1, EXPERTS),
    reached=st.lists(st.integers(0, EXPERTS), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_routing(tokens, slots, reached, seed):
    """Empty experts, one expert taking all, repeats within a token, and the sentinel id E, in any mixture."""
    x, _, weights = batch(tokens, slots=slots, seed=seed)
    choice = torch.randint(len(reached), (tokens, slots), generator=torch.Generator().manual_seed(seed))
    check(make(Flags(bias=True)), x, torch.tensor(reached)[choice], weights, torch.float32)


@pytest.mark.parametrize("tokens", [1, 7])
def test_every_expert_at_once(tokens):
    check(make(), *batch(tokens, slots=EXPERTS), torch.float32)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("parallel", [False, True])
def test_sentinels_add_nothing_and_get_no_gradient(tokens, parallel):
    module = make(Flags(bias=True))
    module._is_expert_parallel = parallel
    x, index, weights = batch(tokens)
    index[:, 1] = EXPERTS
    weights.requires_grad_()
    out = module(x, index, weights)
    out.sum().backward()
    assert (weights.grad[:, 1] == 0).all()
    assert tokens == 0 or (weights.grad[:, 0] != 0).all()
    kept = [0, 2]
    with torch.no_grad():
        torch.testing.assert_close(out, module(x, index[:, kept], weights[:, kept]))
        assert not module(x, torch.full_like(index, EXPERTS), weights).any()


def test_same_as_the_stock_backends():
    for flags in ALL_FLAGS:
        module, (x, index, weights) = make(flags), batch(17)
        with torch.no_grad():
            ours = module(x, index, weights)
            module.config._experts_implementation = "grouped_mm"
            torch.testing.assert_close(ours, module(x, index, weights), rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_the_run():
    module, arguments = make(Flags(bias=True), torch.bfloat16), batch(33, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(module(*arguments), module(*arguments))


def test_plan_leaves_out_what_holds_no_expert():
    index = torch.tensor([[2, EXPERTS], [PAD, 2], [0, 1]])
    plan = Plan.of(index, EXPERTS)
    assert plan.segments == [(0, 0, 1), (1, 1, 2), (2, 2, 4)]
    assert plan.pair.tolist() == [4, 5, 0, 3]
    assert plan.token.tolist() == [2, 2, 0, 1]
    one = Plan.of(torch.tensor([[3, PAD, 1, 3]]), EXPERTS)
    assert (one.segments, one.pair.tolist()) == ([(1, 0, 1), (3, 1, 3)], [2, 0, 3])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_banks_run_under_a_routing(packed, tokens):
    module = make(Flags(bias=True))
    layer = Layer.of_module(module)
    bank = DenseBank(layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias)
    if packed:
        bank = PackedBank.quantise(bank, [2, 3, 4, 8, 16, 4], 8)
        layer = Layer.of_bank(bank.dequantise())
    x, index, weights = batch(tokens)
    index[::3, 1] = PAD
    routing = Routing(index, weights.masked_fill(index < 0, 0))
    slots = run(bank, x, routing)
    assert slots.shape == (tokens, SLOTS, HIDDEN)
    torch.testing.assert_close(slots, reference_slots(layer, x, index).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(bank, x, routing), weighted_sum(slots, routing), rtol=1e-4, atol=1e-5)
