"""Layers run again in the backward: the same loss, the same gradients, nothing counted twice."""

import pytest
import torch
from wholes import tiny, tokens

CASES = {
    "plain": {"balance": {"load": 0.01}, "correction": {}},
    "parallel": {"block": "parallel"},
    "wide": {"hidden_size": 64, "moe_intermediate_size": 64, "balance": {"load": {"weight": 0.1, "scope": "global"}}},
    "momentum": {"wiring": "momentum"},
    "chain": {"wiring": {"kind": "chain", "passes": 2}},
    "heads": {"attention": {"kind": "heads", "shared": 1, "k": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_recomputed_layers_give_the_same_gradients(case):
    ids, found = tokens(4, 32), []
    for recomputed in (False, True):
        model = tiny(**CASES[case]).train()
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        counts = [module.count_E for module in model.modules() if hasattr(module, "count_E")]
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}, counts))
    (one, grads, counts), (two, again, recounted) = found
    assert torch.equal(one, two)
    for name, grad in grads.items():
        assert torch.allclose(grad, again[name], atol=1e-7), name
    assert all(torch.equal(a, b) for a, b in zip(counts, recounted, strict=True))
