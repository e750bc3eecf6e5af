"""What the ranks do for test_attach: a stock model with its experts spread, against the same model in one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.errors import MoekitError
from moekit.lab.experiments._spread import world
from moekit.parallel import Layout, attach, detach, reduce_replicated
from moekit.parallel.llep import LLEP

EXPERTS = 5
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": EXPERTS, "num_experts_per_tok": 2,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def model() -> Any:
    torch.manual_seed(0)
    net = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).double().eval()
    net.set_experts_implementation("eager")
    return net


def ids(rank: int) -> torch.Tensor:
    """Prompts of another length on every rank."""
    return torch.randint(1, 31, (2, 5 + 2 * rank), generator=torch.Generator().manual_seed(rank))


def loss(net: Any, rank: int) -> torch.Tensor:
    return net(ids(rank), labels=ids(rank), use_cache=False).loss


def equals(kind: str) -> dict[str, float]:
    """Largest differences of logits, generated tokens, gradients, and of what comes back after detaching."""
    here, alone, spread = world(), model(), model()
    backward = copy.deepcopy(alone)
    layouts = {"model.layers.1.mlp.experts": Layout(here.size, (1, 0, 1, 1, 0))}
    planner = {"planner": LLEP(threshold=1, chunk=1)} if kind == "llep" else {}
    engines = attach(spread, here, layouts, **planner)
    shapes = {name: list(spread.get_submodule(name).down_proj.shape) for name in engines}
    assert [len(engine.layout.own(here.rank)) for engine in engines.values()] == [s[0] for s in shapes.values()]
    with torch.no_grad():
        logits = (spread(ids(here.rank)).logits - alone(ids(here.rank)).logits).abs().max()
        told = [net.generate(ids(here.rank), max_new_tokens=6, do_sample=False) for net in (spread, alone)]
    loss(spread, here.rank).backward()
    reduce_replicated(spread, here)
    sum(loss(backward, rank) for rank in range(here.size)).backward()
    found = {"logits": float(logits), "tokens": float((told[0] != told[1]).sum()), "gradients": 0.0}
    theirs = dict(backward.named_parameters())
    for name, parameter in spread.named_parameters():
        wanted = theirs[name].grad
        path = name.rpartition(".")[0]
        if path in engines:
            wanted = wanted[engines[path].layout.own(here.rank)]
        found["gradients"] = max(found["gradients"], float((parameter.grad - wanted).abs().max()))
    detach(spread)
    state = spread.state_dict()
    found["weights"] = float(sum((state[n] != t).sum() for n, t in alone.state_dict().items()))
    with torch.no_grad():
        found["detached"] = float((spread(ids(1)).logits - alone(ids(1)).logits).abs().max())
    return found


def refused(case: str) -> str:
    here, net = world(), model()
    try:
        if case == "twice":
            attach(net, here)
            attach(net, here)
        elif case == "unknown":
            attach(net, here, {"model.layers.7.mlp.experts": Layout.contiguous(EXPERTS, here.size)})
        elif case == "slices":
            name = "model.layers.0.mlp.experts"
            attach(net, here, {name: Layout(here.size, tuple(u % 2 for u in range(2 * EXPERTS)), slices=2)})
        elif case == "dense":
            attach(nn.Linear(2, 2), here)
        elif case == "norm":
            net.model.layers[0].mlp.experts.post_expert_norm = nn.LayerNorm(16).double()
            net.model.layers[0].mlp.experts.has_post_expert_norm = True
            attach(net, here)
    except MoekitError as error:
        return str(error)
    return "nothing was raised"
