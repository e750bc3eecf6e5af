"""Every recipe under bfloat16 autocast, as `dtype = "bfloat16"` trains it; a layer alone, its weights drawn."""

import pytest
import torch

from moekit.nn import Experts, MoE, Router, Site, Standalone, initialise
from moekit.train.recipe import Recipe, recipes


@pytest.mark.parametrize("key", recipes())
def test_a_step_in_mixed_precision(key):
    model = Recipe.read(key).with_model(hidden_size=32).build(0).train()
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_layer_alone_has_its_weights_drawn():
    torch.manual_seed(0)
    site = Site(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
    layer = MoE(Router(site, {"select": "top-p"}), Experts(Standalone(), site))
    initialise(layer)
    out = layer(torch.randn(3, 5, 8))
    assert out.shape == (3, 5, 8)
    assert out.isfinite().all()
    assert float(out.detach().abs().max()) > 0
