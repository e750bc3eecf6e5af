"""What the ranks do to try an exchange under tensor parallelism: gaps to one process, and rows against the flat one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moekit.lab.experiments._spread import ROUTINGS, bank, batch, loss, single, world
from moekit.parallel import Engine, Groups, Layout, Planner, Traffic, native, shard
from moekit.parallel._coordinated import Coordinated

EXPERTS = 6


def coordinated(degree: int, owner: Sequence[int] | None = None, planner: Planner = native) -> dict[str, float]:
    """On a rank: largest gaps over all routings; ``disagree`` is 1 where the ranks of a group differ in a bit."""
    here = world()
    groups = Groups.of(here, degree)
    layout = Layout(here.size, tuple(owner)) if owner else Layout.contiguous(EXPERTS, here.size)
    engine, found = Coordinated(groups, layout, planner), dict[str, float]()
    for kind in ROUTINGS:
        for name, gap in _gaps(engine, kind, here.rank // degree, here.size // degree).items():
            found[name] = max(found.get(name, 0.0), gap)
    return found


def _gaps(engine: Coordinated, kind: str, home: int, batches: int) -> dict[str, float]:
    """``home`` is the number of this rank's batch, which its group shares."""
    layout, rank, whole = engine.layout, world().rank, bank(EXPERTS)
    share = shard(whole, layout, rank)
    share = replace(share, **{name: t.detach().requires_grad_() for name, t in share.tensors().items()})
    x, routing = batch(kind, home, EXPERTS)
    x, weight = x.requires_grad_(), routing.weight.requires_grad_()
    out = engine.forward(share, x, routing.with_weight(weight))
    loss(out).backward()
    outs, inputs, banks = single(whole, kind, batches)
    wanted = shard(replace(whole, **dict(zip(whole.tensors(), banks, strict=True))), layout, rank)
    pairs = {"out": (out, outs[home]), "x": (x.grad, inputs[home]), "weight": (weight.grad, inputs[batches + home])}
    pairs |= {name: (share.tensors()[name].grad, t) for name, t in wanted.tensors().items()}
    found = {}
    for name, (ours, theirs) in pairs.items():
        assert ours is not None
        assert ours.shape == theirs.shape, name
        if theirs.numel():
            found[name] = float((ours - theirs).detach().abs().max() / theirs.abs().max().clamp(min=1e-12))
    alike = engine.groups.inside.gather(torch.cat([pairs[n][0].detach().reshape(-1) for n in ("out", "x", "weight")]))
    return {**found, "disagree": float(not bool((alike == alike[0]).all()))}


def rows_sent(degree: int) -> dict[str, int]:
    """On a rank: rows of tokens by either way (those that stay too), peers they went to, bytes of the sums inside."""
    here = world()
    groups, layout, whole = Groups.of(here, degree), Layout.contiguous(EXPERTS, here.size), bank(EXPERTS)
    x, routing = batch("zipf", here.rank // degree, EXPERTS)
    share, found = shard(whole, layout, here.rank), dict[str, int]()
    engines: dict[str, Engine | Coordinated] = {
        "flat": Engine(here, layout),
        "coordinated": Coordinated(groups, layout),
    }
    for name, engine in engines.items():
        traffic: Traffic = here.traffic if name == "flat" else groups.across.traffic
        traffic.clear()
        with torch.no_grad():
            engine.forward(share, x, routing)
        sent = traffic.total("tokens")
        found |= {name: sent.rows + traffic.total("tokens", "self").rows, f"peers, {name}": sent.messages}
    return {**found, "sums": groups.inside.traffic.total("sums inside").nbytes, "x": x.numel() * x.element_size()}
