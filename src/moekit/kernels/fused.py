"""A layer's experts in a handful of compiled calls: gather, both products of all experts, and the weighted sum.

Weights are read where they lie (rows) or from panels; all sums are float32. Threads share each call by tasks of one
expert, some rows and some columns, so that a single token keeps all of them reading.
Shapes by suffix: T tokens, K slots, S pairs that hold an expert, E experts, H hidden size, I intermediate size,
G = 2I if gated else I.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation
from ._layer import Layer
from ._team import together

WINDOW = 2048
"""Sorted pairs that pass through the buffers together: these stay in the last-level cache, and small."""


FEW = 2**16
"""Numbers to be moved below which one thread does it alone."""

UNIT = 32
"""Both sizes of a matrix must be multiples of this many weights."""


@cache
def compiled() -> Any:
    """The module of compiled loops; only where :func:`lacking` finds nothing."""
    return importlib.import_module("moekit.kernels._compiled")


@cache
def lacking() -> str | None:
    """What this machine lacks for compiled kernels, or None."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed: pip install 'moekit[fast]'"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "this CPU has no AVX-512"
    return None


def unfit(layer: Layer) -> str | None:
    """Why the plain weights of a layer cannot be read by compiled kernels, or None."""
    for weight in (layer.gate_up, layer.down):
        if weight.device.type != "cpu":
            return f"the weights are on {weight.device.type}"
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no compiled kernel for {str(weight.dtype)[6:]}"
        if weight.shape[1] % UNIT or weight.shape[2] % UNIT:
            return f"matrices of {weight.shape[1]} x {weight.shape[2]}: only multiples of {UNIT} are compiled for"
        if weight.stride(2) != 1:
            return "the family stores its matrices transposed"
    return lacking()


def of_layer(layer: Layer) -> Fused | None:
    """The plain weights of a layer, read where they lie; None where :func:`unfit` says why not."""
    if unfit(layer):
        return None
    up, down = dense(layer.gate_up, layer.gate_up_bias), dense(layer.down, layer.down_bias)
    return Fused(up, down, layer.activation, layer.finish)


@dataclass(eq=False)
class Matrices:
    """One matrix [N, K] of every expert: ``table`` [E, 7] as :data:`_compiled.FIELDS`, ``kinds[e]`` its weights' kind.

    ``kept`` holds what the table's addresses point to.
    """

    rows: int
    width: int
    kinds: list[str]
    table: np.ndarray
    kept: Any
    panels: bool = False

    def __post_init__(self) -> None:
        self.names = sorted(set(self.kinds))
        self.kind_E = np.array([self.names.index(kind) for kind in self.kinds])

    def functions(self) -> list[Any]:
        form = compiled().by_panels if self.panels else compiled().by_rows
        return [form(kind) for kind in self.names]


class Fused:
    """Both products of every expert of a layer, and what lies between and after them."""

    def __init__(
        self, up: Matrices, down: Matrices, activation: Activation, finish: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.up, self.down, self.activation, self.finish = up, down, activation, finish

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, H] in the dtype of ``x_TH``; sums are float32, in the order of the experts."""
        out = torch.zeros(x_TH.shape)
        weight = weight_TK.detach().to(torch.float32).contiguous()
        for pairs, y in self._windows(x_TH, index_TK):
            _move(compiled().combine(), pairs, index_TK.shape[1], out, y, weight)
        return out.to(x_TH.dtype)

    def slots(self, x_TH: Tensor, index_TK: Tensor) -> Tensor:
        """Unweighted outputs [T, K, H] in the dtype of ``x_TH``; zero where a slot holds no expert."""
        out = x_TH.new_zeros(index_TK.numel(), x_TH.shape[1])
        for pairs, y in self._windows(x_TH, index_TK):
            out[torch.from_numpy(pairs)] = y.to(out.dtype)
        return out.view(*index_TK.shape, x_TH.shape[1])

    def _windows(self, x_TH: Tensor, index_TK: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(places in the flat routing, outputs [.., H]) of at most WINDOW sorted pairs at a time."""
        x = x_TH.detach().to(torch.float32).contiguous()
        experts, threads = len(self.up.kinds), torch.get_num_threads()
        index = index_TK.reshape(-1).to(torch.int64).numpy()
        pairs, start = np.empty(len(index), np.int64), np.empty(experts + 1, np.int64)
        compiled().sort(index, experts, pairs, start)
        total = int(start[-1])
        size = min(WINDOW, total)
        rows, z = torch.empty(size, self.up.width), torch.empty(size, self.up.rows)
        y = torch.empty(size, self.down.rows)
        swiglu = self.activation is SILU_MUL
        h = torch.empty(size, self.down.width) if swiglu else z
        for low in range(0, total, WINDOW):
            high = min(low + WINDOW, total)
            count = high - low
            _move(compiled().gather(), pairs[low:high], index_TK.shape[1], x, rows[:count])
            half = self.down.width if swiglu else 0
            self._products(self.up, rows, z, start, (low, high), threads, half, h if swiglu else None)
            hidden = h if swiglu else self.activation(z[:count]).contiguous()
            self._products(self.down, hidden, y, start, (low, high), threads)
            yield pairs[low:high], self.finish(y[:count]) if self.finish else y[:count]

    def _products(
        self,
        matrices: Matrices,
        x_SK: Tensor,
        out_SN: Tensor,
        start_E: np.ndarray,
        window: tuple[int, int],
        threads: int,
        half: int = 0,
        hidden: Tensor | None = None,
    ) -> None:
        columns = half or matrices.rows
        experts = len(matrices.kinds)
        most = (min(experts, window[1] - window[0]) + WINDOW // compiled().ROWS + 1) * (8 * threads + 1)
        table = np.empty((most, 5), np.int64)
        for code, function in enumerate(matrices.functions()):
            tasks = compiled().share(start_E, matrices.kind_E, code, *window, columns, threads, table)
            job = _job(
                compiled().JOB,
                tasks=tasks,
                table=table.ctypes.data,
                experts=matrices.table.ctypes.data,
                x=x_SK.data_ptr(),
                width=matrices.width,
                out=out_SN.data_ptr(),
                columns=matrices.rows,
                half=half,
                hidden=hidden.data_ptr() if hidden is not None else 0,
            )
            together(function, job.ctypes.data, tasks)


def _move(function: Any, pairs: np.ndarray, slots: int, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
    width = x.shape[1]
    tasks = -(-width // compiled().STRIP)
    job = _job(
        compiled().MOVE,
        tasks=tasks,
        pairs=pairs.ctypes.data,
        rows=len(pairs),
        slots=slots,
        x=x.data_ptr(),
        y=y.data_ptr(),
        weights=weights.data_ptr() if weights is not None else 0,
        width=width,
    )
    together(function, job.ctypes.data, tasks if len(pairs) * width >= FEW else 1)


def _job(record: np.dtype, **fields: int) -> np.ndarray:
    job = np.zeros(1, record)
    fields["here"] = job.ctypes.data
    job[0] = tuple(fields.get(name, 0) for name in record.names or ())
    return job


def dense(stacked_ENK: Tensor, bias_EN: Tensor | None) -> Matrices:
    """Stacked float32, bfloat16 or float16 weights, read where they lie."""
    experts, rows, width = stacked_ENK.shape
    table = np.zeros((experts, len(compiled().FIELDS)), np.int64)
    size = stacked_ENK.element_size()
    table[:, 0] = stacked_ENK.data_ptr() + np.arange(experts) * (stacked_ENK.stride(0) * size)
    table[:, 1] = stacked_ENK.stride(1) * size
    bias = _biases(bias_EN, experts, rows, table)
    return Matrices(rows, width, [str(stacked_ENK.dtype)[6:]] * experts, table, (stacked_ENK, bias))


def _biases(bias_EN: Tensor | None, experts: int, rows: int, table: np.ndarray) -> Tensor:
    bias = torch.zeros(1, rows) if bias_EN is None else bias_EN.detach().to(torch.float32).contiguous()
    table[:, 6] = bias.data_ptr() + (0 if bias_EN is None else np.arange(experts) * rows * 4)
    return bias
