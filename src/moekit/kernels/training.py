"""Forward and backward that keep only the input and the pre-activations.

Of each layer the backward needs x [T, H], z [S, G] (before the activation, sorted by expert) and the routing; the
gathered inputs, the hidden units and the unweighted outputs are recomputed or never needed, because the combine weight
w is folded into the hidden units: y = down(w * h), so dw = <d(w h), h> (the idea is that of SonicMoE, 2512.14080).
Indexing a stacked parameter per expert under autograd would add a full [E, G, H] tensor of zeros for every expert; here
every expert's gradient is written once, in place.
Shapes by suffix: T tokens, K slots, S pairs that hold an expert, M rows of one expert, H hidden size, I intermediate
size, G = 2I if gated else I.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bank import SILU_MUL, Activation
from . import fused
from ._layer import Layer
from ._plan import Plan
from ._tiles import Tiles

FEW_ROWS = 64
"""Rows of an expert below which it shares the row-wise work with its neighbours."""

FRESH = 2**20
"""Bytes of a gradient from which idle experts are left to fresh memory."""


def train(layer: Layer, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """[T, H]; gradients for x, the combine weights, both matrices and both biases (first order only)."""
    if layer.trainable_between or layer.finish is not None:
        return autograd(layer, x_TH, index_TK, weight_TK)
    weights = (layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias)
    compiled = None if x_TH.dtype == torch.float64 else fused.of_layer(layer)
    return _Experts.apply(x_TH, weight_TK, index_TK, layer.activation, compiled, *weights)


def autograd(layer: Layer, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The same by plain autograd: keeps every intermediate, for layers with parameters between the two products."""
    plan = Plan.of(index_TK, layer.num_experts)
    up, down = layer.gate_up.unbind(0), layer.down.unbind(0)
    up_bias = layer.gate_up_bias.unbind(0) if layer.gate_up_bias is not None else [None] * layer.num_experts
    down_bias = layer.down_bias.unbind(0) if layer.down_bias is not None else [None] * layer.num_experts
    out = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
    weight = plan.weights(weight_TK, out.dtype)
    for e, start, stop in plan.segments:
        token = plan.token[start:stop]
        hidden = layer.activation(F.linear(x_TH.index_select(0, token), up[e], up_bias[e]))
        rows = F.linear(hidden, down[e], down_bias[e])
        rows = layer.finish(rows) if layer.finish else rows
        out = out.index_add(0, token, rows * weight[start:stop])
    return out.to(x_TH.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_TK: Tensor,
        index_TK: Tensor,
        activation: Activation,
        compiled: fused.Fused | None,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        plan, tiles = Plan.of(index_TK, down.shape[0]), Tiles(down)
        ctx.segments, ctx.activation, ctx.compiled = plan.segments, activation, compiled
        if compiled is not None:
            kept: list[Tensor] = []
            out = compiled.forward(x_TH, index_TK, weight_TK, kept)
            z_SG = (
                (kept[0] if len(kept) == 1 else torch.cat(kept)).to(down.dtype)
                if kept
                else down.new_empty(0, gate_up.shape[1])
            )
            ctx.save_for_backward(x_TH, weight_TK, z_SG, gate_up, down, gate_up_bias, down_bias, plan.pair)
            return out
        x = x_TH.to(tiles.dtype)
        weight = plan.weights(weight_TK, x.dtype)
        z_SG = down.new_empty(plan.pair.numel(), gate_up.shape[1])
        out = torch.zeros_like(x)
        for chunk in plan.chunks(FEW_ROWS):
            first, last = chunk[0][1], chunk[-1][2]
            token, w = plan.token[first:last], weight[first:last]
            x_c, z = x.index_select(0, token), z_SG[first:last]
            z = x.new_empty(z.shape) if tiles.converts else z
            for e, start, stop in chunk:
                own = slice(start - first, stop - first)
                tiles.linear(x_c[own], gate_up[e], None if gate_up_bias is None else gate_up_bias[e], z[own])
            if tiles.converts:
                z_SG[first:last] = z
            hidden, rows = activation(z) * w, torch.empty_like(x_c)
            for e, start, stop in chunk:
                own = slice(start - first, stop - first)
                tiles.linear(hidden[own], down[e], None, rows[own])
                if down_bias is not None:
                    rows[own].addcmul_(w[own], down_bias[e].to(x.dtype))
            out.index_add_(0, token, rows)
        ctx.save_for_backward(x_TH, weight_TK, z_SG, gate_up, down, gate_up_bias, down_bias, plan.pair)
        return out.to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: recomputation (checkpointing) hands them out once
        if ctx.compiled is not None:
            return _backward(ctx, saved, grads[0])
        x_TH, weight_TK, z_SG, gate_up, down, gate_up_bias, down_bias, pair = saved
        plan = Plan(pair, pair // weight_TK.shape[1], ctx.segments)
        tiles = Tiles(down)
        wide = tiles.dtype
        x, dout = x_TH.to(wide), grads[0].to(wide)
        weight = plan.weights(weight_TK, wide)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight_TK.numel(), dtype=wide, device=x.device)
        banks = (gate_up, down, gate_up_bias, down_bias)
        wanted = [t if need else None for t, need in zip(banks, ctx.needs_input_grad[5:], strict=True)]
        into = _Gradients(tiles, wanted, active=[e for e, _, _ in plan.segments])
        for chunk in plan.chunks(FEW_ROWS):
            first, last = chunk[0][1], chunk[-1][2]
            token, w = plan.token[first:last], weight[first:last]
            dy, x_c = dout.index_select(0, token), x.index_select(0, token)
            dwh, dx_c = x.new_empty(last - first, down.shape[2]), torch.empty_like(x_c)
            for e, start, stop in chunk:
                own = slice(start - first, stop - first)
                tiles.back(dy[own], down[e], dwh[own])
            hidden, dz = _through(ctx.activation, z_SG[first:last].to(wide), dwh, w)
            dw = (dwh * hidden).sum(1)
            hidden.mul_(w)
            for e, start, stop in chunk:
                own = slice(start - first, stop - first)
                if down_bias is not None:
                    dw[own] += torch.mv(dy[own], down_bias[e].to(wide))
                    into.bias(3, e, dy[own] * w[own])
                into.product(1, e, dy[own], hidden[own])
                into.bias(2, e, dz[own])
                into.product(0, e, dz[own], x_c[own])
                if dx is not None:
                    tiles.back(dz[own], gate_up[e], dx_c[own])
            dweight[plan.pair[first:last]] = dw
            if dx is not None:
                dx.index_add_(0, token, dx_c)
        dx = None if dx is None else dx.to(x_TH.dtype)
        return dx, dweight.view_as(weight_TK).to(weight_TK.dtype), None, None, None, *into.tensors


def _backward(ctx: Any, saved: tuple[Any, ...], dout_TH: Tensor) -> tuple[Tensor | None, ...]:
    """The same in compiled calls, for as many whole experts at a time as fill a window."""
    x_TH, weight_TK, z_SG, gate_up, down, gate_up_bias, down_bias, pair = saved
    x, dout = (t.to(torch.float32).contiguous() for t in (x_TH, dout_TH))
    flat, ones = weight_TK.reshape(-1).to(torch.float32), torch.ones(weight_TK.shape)
    dx = torch.zeros(x.shape) if ctx.needs_input_grad[0] else None
    dweight = torch.zeros(flat.shape)
    banks = (gate_up, down, gate_up_bias, down_bias)
    wanted = [t if need else None for t, need in zip(banks, ctx.needs_input_grad[5:], strict=True)]
    into = _Gradients(Tiles(down), wanted, active=[e for e, _, _ in ctx.segments])
    start_E = np.zeros(len(down) + 1, np.int64)
    for e, start, stop in ctx.segments:
        start_E[e + 1] = stop - start
    start_E = start_E.cumsum()
    for group in _windows(ctx.segments):
        low, high = group[0][1], group[-1][2]
        cut, places, slots = (start_E, low, high), pair[low:high].numpy(), weight_TK.shape[1]
        dy, x_c = (fused.gather(t, places, slots) for t in (dout, x))
        dwh = torch.zeros(high - low, down.shape[2])
        fused.turned(down).products(fused.Rows(dy), dwh, cut)
        w = flat.index_select(0, pair[low:high]).unsqueeze(1)
        hidden, dz = _through(ctx.activation, z_SG[low:high].to(torch.float32), dwh, w)
        dw = (dwh * hidden).sum(1)
        hidden.mul_(w)
        for e, start, stop in group:
            own = slice(start - low, stop - low)
            if down_bias is not None:
                dw[own] += torch.mv(dy[own], down_bias[e].to(torch.float32))
                into.bias(3, e, dy[own] * w[own])
            into.product(1, e, dy[own], hidden[own])
            into.bias(2, e, dz[own])
            into.product(0, e, dz[own], x_c[own])
        dweight[pair[low:high]] = dw
        if dx is not None:
            rows = torch.zeros_like(x_c)
            fused.turned(gate_up).products(fused.Rows(dz), rows, cut)
            fused.combine(dx, rows, ones, places)
    dx = None if dx is None else dx.to(x_TH.dtype)
    return dx, dweight.view_as(weight_TK).to(weight_TK.dtype), None, None, None, *into.tensors


def _windows(segments: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Whole experts in order, as many as fill a window; one that has more rows is alone."""
    group: list[tuple[int, int, int]] = []
    for segment in segments:
        if group and segment[2] - group[0][1] > fused.WINDOW:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


class _Gradients:
    """Gradients of the stacked weights: every active expert written once, the others zeroed."""

    def __init__(self, tiles: Tiles, weights: list[Tensor | None], active: list[int]) -> None:
        self.tiles = tiles
        self.tensors = [None if w is None else _zeros(w, active) for w in weights]

    def product(self, which: int, expert: int, dout_MN: Tensor, in_MK: Tensor) -> None:
        target = self.tensors[which]
        if target is not None:
            self.tiles.outer(target[expert], dout_MN, in_MK)

    def bias(self, which: int, expert: int, rows_MN: Tensor) -> None:
        target = self.tensors[which]
        if target is not None:
            target[expert] = rows_MN.sum(0)


def _zeros(weight: Tensor, active: list[int]) -> Tensor:
    """A gradient in which only the active experts are left to be written.

    Fresh memory of the system is zero and costs nothing until it is touched, and nobody touches an idle expert here:
    with one token, writing zeros for all others would be most of a training step.
    """
    nbytes = weight.numel() * weight.element_size()
    if len(active) < len(weight) and weight.device.type == "cpu" and weight.is_contiguous() and nbytes >= FRESH:
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=weight.dtype).view(weight.shape)
    gradient = torch.empty_like(weight)
    for idle in set(range(len(weight))).difference(active):
        gradient[idle].zero_()
    return gradient


def _through(activation: Activation, z_MG: Tensor, dwh_MI: Tensor, weight_M1: Tensor) -> tuple[Tensor, Tensor]:
    """(h [M, I], dz [M, G]) from the gradient of w * h; the hidden units are computed again."""
    dh = dwh_MI * weight_M1
    if activation is SILU_MUL:
        gate, up = z_MG.chunk(2, dim=1)
        silu = F.silu(gate)
        dz = torch.empty_like(z_MG)
        dgate, dup = dz.chunk(2, dim=1)
        torch.mul(dh, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dgate)
        return silu.mul_(up), dz
    with torch.enable_grad():
        z = z_MG.detach().requires_grad_()
        hidden = activation(z)
        (dz,) = torch.autograd.grad(hidden, z, dh)
    return hidden.detach(), dz
