"""Gradients of the training function: against finite differences, against autograd on the oracle, and what is kept."""

from __future__ import annotations

import pytest
import torch
from expert_modules import ALL_FLAGS, EXPERTS, Flags, batch, make

from moekit.kernels import fused
from moekit.kernels._layer import Layer
from moekit.kernels.reference import reference
from moekit.kernels.training import FRESH

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize(
    "flags", [Flags(), Flags(bias=True, transposed=True), Flags(gated=False), Flags(limit=0.3)], ids=str
)
def test_gradcheck(flags):
    module = make(flags, torch.float64, experts=3, hidden=8, inner=4)
    x, index, weights = batch(4, 3, 2, 8, torch.float64)
    index[0, 1] = 3
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, weights, *tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x, index, weights))

    inputs = [t.detach().clone().requires_grad_() for t in (x, weights, *parameters)]
    assert torch.autograd.gradcheck(call, inputs)


# a clamp has a kink: bfloat16 pre-activations fall on either side of it, and gradients differ by whole terms
CASES = [(f, d) for f in ALL_FLAGS for d in BOUND if f.limit is None or d != torch.bfloat16]


@pytest.mark.parametrize(("flags", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("tokens", [1, 30])
def test_gradients_equal_the_oracle(flags, dtype, tokens):
    module = make(flags, dtype)
    x, index, weights = batch(tokens, dtype=dtype)
    index = index.clamp(max=EXPERTS - 2)  # the last expert stays empty: its gradient must be zero, not garbage
    upstream = torch.randn_like(x)

    def gradients(call):
        module.zero_grad()
        leaves = [t.to(module.down_proj.dtype).requires_grad_() for t in (x.detach().clone(), weights.detach().clone())]
        call(leaves[0], index, leaves[1]).backward(upstream.to(leaves[0].dtype))
        return [leaf.grad.double() for leaf in (*leaves, *module.parameters())]

    ours = gradients(module)
    module.double()
    expected = gradients(lambda *arguments: reference(Layer.of_module(module), *arguments))
    for got, want in zip(ours, expected, strict=True):
        assert (got - want).norm() <= BOUND[dtype] * want.norm() + 1e-12
    assert not module.down_proj.grad[-1].any()


@pytest.mark.skipif(fused.lacking() is not None, reason=str(fused.lacking()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [Flags(), Flags(bias=True), Flags(gated=False, bias=True), Flags(limit=9.0)], ids=str)
@pytest.mark.parametrize(("tokens", "window"), [(0, 99), (1, 99), (9, 99), (130, 70)])
def test_compiled_gradients_equal_the_oracle(monkeypatch, flags, dtype, tokens, window):
    """Sizes that fused kernels take; experts with 0 to 90 rows, more than a window among them."""
    monkeypatch.setattr(fused, "WINDOW", window)
    module = make(flags, dtype, experts=6, hidden=96, inner=64)
    x, index, weights = batch(tokens, 6, 3, 96, dtype)
    index = index.clamp(min=1)  # expert 0 stays empty, expert 1 gets twice as much as others
    upstream = torch.randn_like(x)

    def gradients(call, width):
        module.zero_grad()
        leaves = [t.to(width).requires_grad_() for t in (x.detach().clone(), weights.detach().clone())]
        call(leaves[0], index, leaves[1]).backward(upstream.to(width))
        every = (*leaves, *module.parameters())
        return [(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).double() for leaf in every]

    ours = gradients(module, dtype)
    assert not module.down_proj.grad[0].any()
    module.double()
    expected = gradients(lambda *arguments: reference(Layer.of_module(module), *arguments), torch.float64)
    for got, want in zip(ours, expected, strict=True):
        assert (got - want).norm() <= BOUND[dtype] * want.norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_idle_experts_get_zeros_from_fresh_memory(dtype):
    """Large gradients with idle experts: zero where nothing was written, and ordinary tensors to an optimiser."""
    module = make(Flags(), dtype, experts=40, hidden=128, inner=96)
    assert module.gate_up_proj.nbytes > FRESH
    x, _, weights = batch(2, 40, 1, 128, dtype)
    module(x, torch.tensor([[3], [17]]), weights).sum().backward()
    used = [e for e in range(40) if module.gate_up_proj.grad[e].any()]
    assert used == [3, 17]
    before = module.gate_up_proj.detach().clone()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert torch.equal(module.gate_up_proj[0], before[0])
    assert not torch.equal(module.gate_up_proj[3], before[3])
    module(x, torch.tensor([[3], [17]]), weights).sum().backward()  # adds to what is there


def test_only_what_is_asked_for():
    module, (x, index, weights) = make(Flags(bias=True)), batch(9)
    module.requires_grad_(False)
    x.requires_grad_()
    module(x, index, weights).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in module.parameters())
    module.down_proj.requires_grad_()
    module(x.detach(), index, weights).sum().backward()
    assert module.down_proj.grad is not None
    assert module.gate_up_proj.grad is None


def kept_bytes(module, arguments) -> int:
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert module(*arguments).requires_grad
    return sum(kept.values())


def test_keeps_inputs_and_pre_activations_only():
    module, arguments = make(experts=8, hidden=64, inner=32), batch(128, 8, 8, hidden=64)
    for differentiable in (arguments[0], arguments[2]):
        differentiable.requires_grad_()
    ours = kept_bytes(module, arguments)
    tokens, slots = arguments[1].shape
    floor = 4 * (tokens * 64 + tokens * slots * 2 * 32)
    assert floor <= ours <= 1.1 * floor
    module.config._experts_implementation = "grouped_mm"
    assert ours <= 0.35 * kept_bytes(module, arguments)


def test_trains_through_parameters_between_the_products():
    module, arguments = make(Flags(norm=True)), batch(9)
    module(*arguments).square().sum().backward()
    assert module.post_expert_norm.weight.grad.norm() > 0
    assert module.gate_up_proj.grad.norm() > 0
