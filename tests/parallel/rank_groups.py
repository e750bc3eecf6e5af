"""What the ranks do for test_groups: experts spread inside groups, every group with all of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rank_attach import SIZES, ids, loss
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.lab.experiments._spread import bank, exact, world
from moekit.parallel import Engine, Groups, Layout, ParallelError, attach, detach, reduce_replicated, two_level


def model(experts: int) -> Any:
    torch.manual_seed(0)
    net = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | {"num_experts": experts})).double().eval()
    net.set_experts_implementation("eager")
    return net


def trains(experts: int, degree: int, nodes: int) -> dict[str, Any]:
    """Logits and summed gradients of a spread model against one process, the sizes of its groups, and what is sent."""
    here, alone, spread = world(nodes), model(experts), model(experts)
    engines = attach(spread, here, degree=degree)
    backward = copy.deepcopy(alone)
    with torch.no_grad():
        gap = float((spread(ids(here.rank)).logits - alone(ids(here.rank)).logits).abs().max())
    loss(spread, here.rank).backward()
    reduce_replicated(spread, here)
    sum(loss(backward, rank) for rank in range(here.size)).backward()
    theirs, gradients = dict(backward.named_parameters()), 0.0
    for name, parameter in spread.named_parameters():
        engine, wanted = engines.get(name.rpartition(".")[0]), theirs[name].grad
        wanted = wanted if engine is None else wanted[engine.layout.own(engine.world.rank)]
        gradients = max(gradients, float((parameter.grad - wanted).abs().max()))
    detach(spread)
    back = sum(int((t != alone.state_dict()[n]).sum()) for n, t in spread.state_dict().items())
    sent = {engine.world.traffic.total("tokens", "inter").rows for engine in engines.values()}
    return {
        "logits": gap,
        "gradients": gradients,
        "changed": back,
        "sizes": {engine.world.size for engine in engines.values()},
        "between nodes": max(sent),
    }


def members(nodes: int, size: int) -> dict[str, Any]:
    here = world(nodes)
    groups = Groups.of(here, size)
    grids = [(one.grid.nodes, one.grid.per_node) for one in (groups.inside, groups.across)]
    return {"inside": groups.inside.members, "across": groups.across.members, "grids": grids}


def levels() -> float:
    """A group that spans two nodes exchanges in two levels."""
    inside = Groups.of(world(2), 4).inside
    return max(exact(Engine(inside, Layout.contiguous(6, 4), exchange=two_level), bank(6)).values())


def refused(nodes: int, size: int) -> str:
    try:
        Groups.of(world(nodes), size)
    except ParallelError as error:
        return str(error)
    return "nothing was raised"


def odd() -> str:
    """Every rank asks for groups of another size."""
    return refused(1, world().rank + 1)
