"""What the ranks do for test_uni_moe: each changes its own experts, then they are gathered."""

from __future__ import annotations

from typing import Any

import torch
from rank_groups import model

from moekit.blocks import blocks
from moekit.lab.experiments._spread import world
from moekit.parallel import Layout, ParallelError
from moekit.parallel.uni_moe import gather


def gathers(experts: int) -> dict[str, Any]:
    here, net, start = world(), model(experts), model(experts)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += here.rank + 1  # every rank changes everything: only its own experts may be taken
    here.traffic.clear()
    gather(net, here)
    layout, right = Layout.contiguous(experts, here.size), True
    for block, before in zip(blocks(net), blocks(start), strict=True):
        for name, tensor in block.bank().tensors().items():
            wanted = torch.stack([t + 1 + layout.owner[e] for e, t in enumerate(before.bank().tensors()[name])])
            right &= torch.equal(tensor, wanted)
    sent = here.traffic.total("checkpoint").nbytes
    each = sum(block.bank().nbytes for block in blocks(net)) // experts
    kept = torch.equal(net.lm_head.weight, start.lm_head.weight + here.rank + 1)
    return {"right": right, "kept": kept, "sent": sent, "own": each * len(layout.own(here.rank))}


def refused(experts: int) -> str:
    try:
        gather(model(experts), world())
    except ParallelError as error:
        return str(error)
    return ""
