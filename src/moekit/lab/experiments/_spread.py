"""What experiments on several ranks share: layers, routings, the answer of one process, and the comparison with it.

Every rank can make everything here for itself from seeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.bank import SILU_MUL, Activation
from moekit.contract import PAD, Routing
from moekit.formats import DenseBank
from moekit.kernels._layer import Layer
from moekit.kernels.training import autograd
from moekit.parallel import Engine, Groups, Layout, World, shard
from moekit.parallel._groups import sum_gradients

HIDDEN, INNER, SLOTS, TOKENS = 6, 8, 2, 23
RELU = Activation("relu", torch.relu, gated=False)
ROUTINGS = ("zipf", "one-hot", "empty-rank", "padded", "uniform")


PATIENCE = 900.0
"""Seconds that ranks wait for each other, and we for them: experiments share a machine with others."""


@cache
def world(nodes: int = 1) -> World:
    return World.join(nodes, PATIENCE)


def bank(experts: int, gated: bool = True, bias: bool = True, dtype: torch.dtype = torch.float64) -> DenseBank:
    """Random experts, trainable."""
    draw = torch.Generator().manual_seed(experts)
    rows = 2 * INNER if gated else INNER

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).mul(0.5).to(dtype).requires_grad_()

    up_bias, down_bias = (weight(experts, rows), weight(experts, HIDDEN)) if bias else (None, None)
    up, down = weight(experts, rows, HIDDEN), weight(experts, HIDDEN, INNER)
    return DenseBank(up, down, up_bias, down_bias, SILU_MUL if gated else RELU)


def batch(kind: str, rank: int, experts: int, seed: int = 0) -> tuple[Tensor, Routing]:
    """A rank's own tokens [T, H] (float64) and routing; payloads differ by rank, so that a swap of ranks shows."""
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = 0 if kind == "empty-rank" and rank == 1 else TOKENS + rank
    x = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64) + 0.1 * rank
    slots = min(SLOTS, experts)
    if kind == "one-hot":
        index, weight = torch.full((tokens, 1), experts - 1), torch.rand(tokens, 1, generator=draw, dtype=torch.float64)
    else:
        share = 1 / torch.arange(1, experts + 1, dtype=torch.float64) ** (0 if kind == "uniform" else 1.5)
        index = torch.multinomial(share.expand(max(tokens, 1), -1), slots, generator=draw)[:tokens]
        weight = torch.rand(tokens, slots, generator=draw, dtype=torch.float64)
    if kind == "padded":
        index = index.masked_fill(torch.rand(index.shape, generator=draw) < 0.4, PAD)
    return x, Routing(index, weight.masked_fill(index < 0, 0))


def single(
    whole: DenseBank, kind: str, size: int, goal: float = 1.0
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(outputs, gradients of x and of the combine weights) per rank, and gradients of the bank, in one process."""
    parts = [batch(kind, rank, whole.num_experts) for rank in range(size)]
    xs = [x.to(whole.dtype).requires_grad_() for x, _ in parts]
    weights = [r.weight.to(whole.dtype).requires_grad_() for _, r in parts]
    outs = [autograd(Layer.of_bank(whole), x, r.expert, w) for x, w, (_, r) in zip(xs, weights, parts, strict=True)]
    leaves = [*xs, *weights, *whole.tensors().values()]
    grads = torch.autograd.grad(sum(loss(out) for out in outs), leaves, materialize_grads=True)
    return [o.detach() for o in outs], list(grads[: 2 * size]), list(grads[2 * size :])


def loss(out: Tensor) -> Tensor:
    return ((out - 1) ** 2).sum()


def figures_of(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % t interval over seeds, as JSON takes it."""
    # ranks import this module too, and need none of what this brings along
    from moekit.measure import Interval

    return asdict(Interval.over_seeds(values))


def cpu_share(seconds: float = 0.2) -> float:
    """What part of a core this rank is given while all ranks compute at once: well below 1, times mean little."""
    a = torch.randn(256, 256)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < seconds:
        a @ a
    return (time.thread_time() - cpu) / (time.perf_counter() - wall)


class Clock:
    """Wall seconds of all ranks, and processor seconds of this one, of the same thing done again and again."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def time(self, way: Callable[[], object], count: bool = True) -> None:
        """All ranks start together and the wall clock stops when the last is done. ``count`` False only warms up."""
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        way()
        spent = time.process_time() - cpu
        dist.barrier()
        if count:
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(spent)

    def medians(self) -> dict[str, float]:
        return {"wall": statistics.median(self.wall), "cpu": statistics.median(self.cpu)}


def exact(engine: Engine, whole: DenseBank, across: World | None = None) -> dict[str, float]:
    """:func:`worst` over all routings."""
    found: dict[str, float] = {}
    for kind in ROUTINGS:
        for name, gap in worst(engine, whole, kind, across).items():
            found[name] = max(found.get(name, 0.0), gap)
    return found


def grouped(size: int) -> dict[str, float]:
    """On a rank: :func:`exact` for experts spread inside groups of ``size`` ranks, gradients summed across them."""
    groups = Groups.of(world(), size)
    return exact(Engine(groups.inside, Layout.contiguous(6, size)), bank(6), groups.across)


def worst(engine: Engine, whole: DenseBank, kind: str, across: World | None = None) -> dict[str, float]:
    """Largest difference to the single process relative to the largest number there, by what is compared.

    With ``across`` the engine runs inside one of several groups, and the single process is that of all ranks.
    """
    here, own = engine.world if across is None else world(), engine.world.rank
    share = shard(whole, engine.layout, own)
    share = replace(share, **{name: t.detach().requires_grad_() for name, t in share.tensors().items()})
    x, routing = batch(kind, here.rank, whole.num_experts)
    x, weight = x.to(whole.dtype).requires_grad_(), routing.weight.to(whole.dtype).requires_grad_()
    out = engine.forward(share, x, routing.with_weight(weight))
    loss(out).backward()
    if across is not None:
        sum_gradients(across, share.tensors().values())
    outs, inputs, banks = single(whole, kind, here.size)
    found = {
        "out": _gap(out, outs[here.rank]),
        "x": _gap(x.grad, inputs[here.rank]),
        "weight": _gap(weight.grad, inputs[here.size + here.rank]),
    }
    wanted = shard(replace(whole, **dict(zip(whole.tensors(), banks, strict=True))), engine.layout, own)
    for name, tensor in wanted.tensors().items():
        found[name] = _gap(share.tensors()[name].grad, tensor)
    with torch.no_grad():
        found["no_grad"] = _gap(engine.forward(share, x, routing.with_weight(weight)), out)
    return found


def _gap(ours: Any, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not theirs.numel():
        return 0.0
    ours = ours.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
