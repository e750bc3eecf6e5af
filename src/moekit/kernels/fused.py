"""A layer's experts in a handful of compiled calls: gather, both products of all experts, and the weighted sum.

Weights are read where they lie (rows) or from panels; all sums are float32. Threads share each call by tasks of one
expert, some rows and some columns, so that a single token keeps all of them reading.
Shapes by suffix: T tokens, K slots, S pairs that hold an expert, E experts, H hidden size, I intermediate size,
G = 2I if gated else I.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation
from ._arrivals import Arrivals, windows
from ._layer import Layer
from ._team import together

WINDOW = 2048
"""Sorted pairs that pass through the buffers together: these stay in the last-level cache, and small."""


FEW = 2**16
"""Numbers to be moved below which one thread does it alone."""

UNIT = 32
"""Both sizes of a matrix must be multiples of this many weights."""


FIELDS = ("weight", "stride", "scales", "mins", "scale_stride", "shift", "bias", "planes")
"""Of one expert's matrix: addresses, bytes of a row and of a row of scales, logarithm of the group size; ``planes`` is
the address of what a kind of weights has beyond that."""


@cache
def compiled() -> Any:
    """The module of compiled loops; only where :func:`lacking` finds nothing."""
    return importlib.import_module("moekit.kernels._compiled")


@cache
def routes() -> Any:
    """The module of what goes on around them, likewise."""
    return importlib.import_module("moekit.kernels._routes")


@cache
def lacking() -> str | None:
    """What this machine lacks for compiled kernels, or None."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed: pip install 'moekit[fast]'"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "this CPU has no AVX-512"
    return None


def compile_seconds() -> float:
    """Spent on compiling, or on loading what was compiled before, in this process; 0 before the first call."""
    module = sys.modules.get("moekit.kernels._compiled")
    return sum(module.SECONDS.values()) if module else 0.0


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
class Rows:
    """Inputs of a product, [S, K]: float32, or bytes around 128 times ``scales`` [S].

    ``codes`` holds them once more with 16 bits, for kinds of weights that are multiplied with integers.
    """

    values: Tensor
    scales: Tensor | None = None
    codes: Tensor | None = None


@dataclass(eq=False)
class Matrices:
    """One matrix [N, K] of every expert: ``table`` [E, 8] as :data:`FIELDS`, ``kinds[e]`` its weights' kind.

    ``form`` is how the weights lie: "rows", "columns" (of the transposed matrix), "panels" or "int8"; ``kept`` holds
    what the table's addresses point to.
    """

    rows: int
    width: int
    kinds: list[str]
    table: np.ndarray
    kept: Any
    form: str = "rows"

    def __post_init__(self) -> None:
        self.names = sorted(set(self.kinds))
        code = {name: number for number, name in enumerate(self.names)}
        self.kind_E = np.array([code[kind] for kind in self.kinds], np.int64)

    def functions(self) -> list[Any]:
        """The compiled products, one for each of ``names``."""
        if self.form == "int8":
            return [compiled().by_int8()]
        return [getattr(compiled(), f"by_{self.form}")(name) for name in self.names]

    def inputs(self, x_TK: Tensor, pairs: np.ndarray | None = None, slots: int = 1) -> Rows:
        """The rows of x that the pairs (None: all rows) ask for, as this matrix wants them."""
        rows, width = len(x_TK) if pairs is None else len(pairs), x_TK.shape[1]
        tasks, at = -(-rows // routes().ROUNDED), {"slots": slots, "x": x_TK.data_ptr()}
        if self.form == "int8":
            y, scales = torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows)
            at |= {"y": y.data_ptr(), "weights": scales.data_ptr()}
            _move(routes().rounded("8"), tasks, pairs, rows, width, **at)
            return Rows(y, scales)
        y = x_TK if pairs is None else gather(x_TK, pairs, slots)
        if not any(compiled().rounds(name) for name in self.names):
            return Rows(y)
        codes = torch.empty(rows, compiled().code_size(width), dtype=torch.uint8)
        _move(routes().rounded("16"), tasks, pairs, rows, width, y=codes.data_ptr(), **at)
        return Rows(y, codes=codes)

    def products(
        self, x: Rows, out_SN: Tensor, cut: tuple[np.ndarray, int, int], hidden_SI: Tensor | None = None
    ) -> None:
        """out = x @ W.T + bias of every expert; silu(first half) * second half into ``hidden_SI`` if given.

        ``cut``: where each expert's rows begin [E + 1], and the window of rows that x and ``out`` hold.
        """
        half = 0 if hidden_SI is None else hidden_SI.shape[1]
        fields = {"x": x.values.data_ptr(), "scales": _address(x.scales), "codes": _address(x.codes)}
        fields |= {"width": self.width, "out": out_SN.data_ptr(), "columns": self.rows}
        fields |= {"half": half, "hidden": _address(hidden_SI)}
        for code, function in enumerate(self.functions()):
            self.shared(function, cut, code, half or self.rows, routes().ROWS, **fields)

    def shared(
        self, function: Any, cut: tuple[np.ndarray, int, int], code: int, span: int, most: int, **fields: int
    ) -> None:
        """Run a compiled function for all experts of one kind, in tasks of some of ``span`` columns, ``most`` rows."""
        start_E, low, high = cut
        threads = torch.get_num_threads()
        pieces = min(len(self.kinds), high - low) + (high - low) // most + 1
        table = np.empty((pieces * (8 * threads + 1), 5), np.int64)
        tasks = routes().share(start_E, self.kind_E, code, low, high, span, threads, most, table)
        places = {"table": table.ctypes.data, "experts": self.table.ctypes.data}
        job = _job(compiled().JOB, tasks=tasks, **places, **fields)
        together(function, job.ctypes.data, tasks)


class Fused:
    """Both products of every expert of a layer, and what lies between and after them."""

    def __init__(
        self, up: Matrices, down: Matrices, activation: Activation, finish: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.up, self.down, self.activation, self.finish = up, down, activation, finish

    def forward(
        self,
        x_TH: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        kept: list[Tensor] | None = None,
        arrivals: Arrivals | None = None,
    ) -> Tensor:
        """[T, H] in the dtype of ``x_TH``; sums are float32, in the order of the experts.

        ``kept`` takes the pre-activations [.., G] of the sorted pairs, part after part.
        """
        out = torch.zeros(x_TH.shape)
        weight = weight_TK.detach().to(torch.float32).contiguous()
        for pairs, y in self._windows(x_TH, index_TK, kept, arrivals):
            combine(out, y, weight, pairs)
        return out.to(x_TH.dtype)

    def slots(self, x_TH: Tensor, index_TK: Tensor) -> Tensor:
        """Unweighted outputs [T, K, H] in the dtype of ``x_TH``; zero where a slot holds no expert."""
        out = x_TH.new_zeros(index_TK.numel(), x_TH.shape[1])
        for pairs, y in self._windows(x_TH, index_TK):
            out[torch.from_numpy(pairs)] = y.to(out.dtype)
        return out.view(*index_TK.shape, x_TH.shape[1])

    def _windows(
        self, x_TH: Tensor, index_TK: Tensor, kept: list[Tensor] | None = None, arrivals: Arrivals | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(places in the flat routing, outputs [.., H]) of at most WINDOW sorted pairs at a time."""
        x, slots = x_TH.detach().to(torch.float32).contiguous(), index_TK.shape[1]
        index = index_TK.reshape(-1).to(torch.int64).numpy()
        pairs, start = np.empty(len(index), np.int64), np.empty(len(self.up.kinds) + 1, np.int64)
        routes().sort(index, len(self.up.kinds), pairs, start)
        swiglu = self.activation is SILU_MUL
        for low, high in windows(start, WINDOW, arrivals):
            part, cut = pairs[low:high], (start, low, high)
            z = torch.empty(high - low, self.up.rows)
            h = torch.empty(high - low, self.down.width) if swiglu else z
            self.up.products(self.up.inputs(x, part, slots), z, cut, h if swiglu else None)
            if kept is not None:
                kept.append(z)
            h = h if swiglu else self.activation(z).contiguous()
            y = torch.empty(high - low, self.down.rows)
            self.down.products(self.down.inputs(h), y, cut)
            yield part, self.finish(y) if self.finish else y


def gather(x_TH: Tensor, pairs: np.ndarray, slots: int) -> Tensor:
    """The token's row of every pair, [S, H]; float32."""
    rows, width = len(pairs), x_TH.shape[1]
    y = torch.empty(rows, width)
    places = {"x": x_TH.data_ptr(), "y": y.data_ptr()}
    _move(routes().gather(), _strips(width), pairs, rows, width, slots=slots, **places)
    return y


def combine(out_TH: Tensor, y_SH: Tensor, weight_TK: Tensor, pairs: np.ndarray) -> None:
    """out[token of the pair] += weight of the pair * its row of y, pair after pair; float32."""
    rows, width = y_SH.shape
    places = {"x": out_TH.data_ptr(), "y": y_SH.data_ptr(), "weights": weight_TK.data_ptr()}
    _move(routes().combine(), _strips(width), pairs, rows, width, slots=weight_TK.shape[1], **places)


def _move(function: Any, tasks: int, pairs: np.ndarray | None, rows: int, width: int, **fields: int) -> None:
    at = pairs.ctypes.data if pairs is not None else 0
    job = _job(routes().MOVE, tasks=tasks, pairs=at, rows=rows, width=width, **fields)
    together(function, job.ctypes.data, tasks if rows * width >= FEW else 1)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strips(width: int) -> int:
    return -(-width // routes().STRIP)


def _job(record: np.dtype, **fields: int) -> np.ndarray:
    job = np.zeros(1, record)
    fields["here"] = job.ctypes.data
    job[0] = tuple(fields.get(name, 0) for name in record.names or ())
    return job


def dense(stacked_ENK: Tensor, bias_EN: Tensor | None) -> Matrices:
    """Stacked float32, bfloat16 or float16 weights, read where they lie."""
    experts, rows, width = stacked_ENK.shape
    size = stacked_ENK.element_size()
    table, bias = with_bias(experts, rows, bias_EN)
    table[:, 0] = stacked_ENK.data_ptr() + np.arange(experts) * (stacked_ENK.stride(0) * size)
    table[:, 1] = stacked_ENK.stride(1) * size
    return Matrices(rows, width, [str(stacked_ENK.dtype)[6:]] * experts, table, (stacked_ENK, bias))


def with_bias(experts: int, rows: int, bias_EN: Tensor | None) -> tuple[np.ndarray, Tensor]:
    """A table of experts in which only the biases are filled in, and what they point to."""
    table = np.zeros((experts, len(FIELDS)), np.int64)
    bias = torch.zeros(1, rows) if bias_EN is None else bias_EN.detach().to(torch.float32).contiguous()
    table[:, 6] = bias.data_ptr() + (0 if bias_EN is None else np.arange(experts) * rows * 4)
    return table, bias


def turned(stacked_ENK: Tensor) -> Matrices:
    """The same weights for products x @ W, of gradients: x [S, N] added to out [S, K]."""
    rows, width = stacked_ENK.shape[1:]
    matrices = dense(stacked_ENK, None)
    matrices.table[:, 4] = stacked_ENK.element_size()
    zeros = torch.zeros(width)
    matrices.table[:, 6] = zeros.data_ptr()
    return Matrices(width, rows, matrices.kinds, matrices.table, (stacked_ENK, zeros), "columns")
