"""`blocks` on models of our own: their routers keep the contract themselves."""

import torch
from wholes import tiny, tokens

import moekit


def test_choices_are_those_of_the_running_model():
    model = tiny(others=["zero", "copy"], router={"weigh": "decoupled", "select": {"kind": "top-k", "k": 3}})
    block = moekit.blocks(model)[0]
    seen = []
    with block.observe(seen.append), torch.no_grad():
        model(tokens())
    (found,) = seen
    chosen = block.choose(found.router_TH)
    own = (chosen.expert >= 0) & (chosen.expert < block.num_experts)
    assert torch.equal(chosen.expert.where(own, -1), found.routing.expert)
    assert torch.allclose(chosen.weight * own, found.routing.weight)
    assert found.residual_TH is not None


def test_edits_reach_the_experts_and_leave_no_trace():
    model, ids = tiny(router={"activation": "sigmoid"}, correction={}), tokens()
    block = moekit.blocks(model)[1]
    with torch.no_grad():
        before = model(ids).logits
        with block.mask([0, 2]):
            load = model(ids).expert_load[1]
            assert not torch.equal(model(ids).logits, before)
        assert load[[1, 3]].tolist() == [0, 0]
        assert torch.equal(model(ids).logits, before)
