"""Running a compiled function on all of torch's threads at once.

The threads are those of the OpenMP runtime that torch itself uses: a second pool would wait for the first one, whose
threads keep their cores busy for milliseconds after every operation.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch


def together(function: Any, argument: int, tasks: int) -> None:
    """Call a Numba cfunc with one address, on as many threads as torch has and ``tasks`` keep busy, and wait."""
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        if tasks:
            function.ctypes(ctypes.c_void_p(argument))
        return
    fork = _openmp()
    if fork is not None:
        fork(function.address, argument, threads, 0)
        return
    list(_pool(threads).map(lambda _: function.ctypes(ctypes.c_void_p(argument)), range(threads)))


@cache
def _openmp() -> Any:
    """``GOMP_parallel(function, argument, threads, flags)`` of torch's own OpenMP, or None where it has none such."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            fork = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        fork.argtypes, fork.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return fork
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "moekit")
