"""What transformers lets a caller ask for beside the logits."""

import torch
from wholes import tiny, tokens


def test_hidden_states_and_router_logits_are_told_when_asked_for():
    model, ids = tiny(num_hidden_layers=3, dense_layers=[0]).eval(), tokens(2, 7)
    out = model(ids, output_hidden_states=True, output_router_logits=True)
    plain = model(ids)
    assert plain.hidden_states is None
    assert plain.router_logits is None
    assert len(out.hidden_states) == 1 + 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), plain.logits)
    assert [logits.shape for logits in out.router_logits] == [(14, model.config.num_experts)] * 2
    chosen = out.router_logits[0].topk(model.config.num_experts_per_tok).indices
    load = torch.bincount(chosen.flatten(), minlength=model.config.num_experts)
    assert torch.equal(load, out.expert_load[0])


def test_attention_has_routers_of_its_own():
    model = tiny(attention={"kind": "heads", "shared": 1, "k": 2}).eval()
    out = model(tokens(1, 5), output_router_logits=True)
    assert len(out.router_logits) == model.config.num_hidden_layers


def test_tuples():
    model, ids = tiny().eval(), tokens(1, 4)
    first = model(ids, return_dict=False)[0]
    assert torch.equal(first, model(ids).logits)
