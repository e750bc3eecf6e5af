"""Expert kernels side by side: transformers' backends, moekit plain, prepared, int8, stored formats, in one process.

Contestants of a shape take turns, each repetition with a fresh routing of its own (so weights are as cold as they
would be), and a figure is the median over repetitions of the ratio within one repetition. Writes experts.json and
experts.md beside this file. ``--quick`` tries it out, ``--threads N``, ``--shapes 0,3``, ``--dtype float32``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from experts_report import markdown, summary
from experts_stored import DISTINCT, STORED, stored
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moekit
from moekit.kernels._tiles import has_units

SHAPES = (
    (2048, 1024, 64, 8, 1),
    (2048, 1024, 64, 8, 8),
    (2048, 1024, 64, 8, 256),
    (2048, 768, 128, 8, 512),
    (1024, 512, 128, 8, 1),
    (1024, 512, 128, 8, 64),
    (512, 256, 32, 4, 1024),
    (256, 128, 16, 2, 2048),
    (4096, 1408, 8, 2, 64),
    (1024, 512, 64, 8, 2048),
)
"""(H, I, E, k, T): hidden size, intermediate size, experts, slots per token, tokens."""

DECODE_TOKENS, PREFILL_TOKENS = 8, 256


def empty_module(hidden: int, inner: int, experts: int, implementation: str) -> Any:
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, hidden_act="silu")
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def experts_module(hidden: int, inner: int, experts: int, dtype: torch.dtype) -> Any:
    module = empty_module(hidden, inner, experts, "grouped_mm").to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for weight in module.parameters():
            drawn = torch.randn(DISTINCT, *weight.shape[1:]) / math.sqrt(weight.shape[2])
            for expert, part in enumerate(weight):
                part.copy_(drawn[expert % DISTINCT])
    return module


def sharing(module: Any, implementation: str) -> Any:
    """A second experts module on the same weights with an implementation of its own."""
    experts, hidden, inner = module.down_proj.shape
    twin = empty_module(hidden, inner, experts, implementation)
    twin.gate_up_proj, twin.down_proj = module.gate_up_proj, module.down_proj
    return twin


def prepared(module: Any, bits: int | None) -> Any:
    twin = sharing(module, "moekit")
    return twin, moekit.prepare(twin, bits=bits, keep=True)


def routing(tokens: int, experts: int, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(tokens, experts)
    index = scores.topk(slots, dim=1).indices
    return index, torch.softmax(torch.randn(tokens, slots), dim=1).to(dtype)


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = time.perf_counter


def timed(call: Callable[[], Any]) -> float:
    start = clock()
    call()
    return clock() - start


def race(contestants: dict[str, Callable[..., Any]], draw: Callable[[], tuple], seconds: float) -> dict[str, list]:
    """Seconds of every contestant, taking turns until the time is used; at least 3 repetitions after a warm-up."""
    for run in contestants.values():
        run(*draw())
    times: dict[str, list] = {name: [] for name in contestants}
    started = time.perf_counter()
    order = list(contestants)
    while len(times[order[0]]) < 3 or (time.perf_counter() - started < seconds and len(times[order[0]]) < 200):
        order = order[1:] + order[:1]
        for name in order:
            arguments = draw()
            times[name].append(timed(lambda n=name, a=arguments: contestants[n](*a)))
    return times


def ratio(times: dict[str, list], reference: str, ours: str) -> float:
    return statistics.median(r / o for r, o in zip(times[reference], times[ours], strict=True))


def read_bandwidth(buffer: torch.Tensor) -> float:
    """GB/s of the faster of two ways to read a buffer much larger than the caches once."""
    vector = torch.ones(buffer.shape[1])
    reads = (lambda: torch.mv(buffer, vector), lambda: buffer.sum())
    best = min(timed(read) for read in reads for _ in range(5))
    return buffer.numel() * buffer.element_size() / best / 1e9


def saved_bytes(run: Callable[[], torch.Tensor], weights: list[torch.Tensor]) -> int:
    """Bytes of distinct storages kept for the backward, weights excluded."""
    own = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


def inference(shape: tuple, dtype: torch.dtype, module: Any, seconds: float) -> dict[str, Any]:
    hidden, inner, experts, slots, tokens = shape
    x = torch.randn(tokens, hidden).to(dtype)
    contestants: dict[str, Any] = {name: sharing(module, name) for name in ("eager", "grouped_mm")}
    if tokens <= DECODE_TOKENS:
        contestants["batched_mm"] = sharing(module, "batched_mm")
    contestants["plain"] = sharing(module, "moekit")
    contestants["prepared"], report = prepared(module, None)
    contestants["int8"], _ = prepared(module, 8)
    if dtype == torch.bfloat16:
        contestants |= {name: stored(module, name) for name in STORED}
    with torch.no_grad():
        index, weight = routing(tokens, experts, slots, dtype)
        exact = sharing(module, "eager")(x, index, weight).float()
        errors = {
            name: float((run(x, index, weight).float() - exact).norm() / exact.norm())
            for name, run in contestants.items()
            if name not in STORED
        }
        times = race(contestants, lambda: (x, *routing(tokens, experts, slots, dtype)), seconds)
        dense_x, dense_w = torch.randn(tokens * slots, hidden).to(dtype), torch.randn(3 * inner, hidden).to(dtype)
        dense = statistics.median(timed(lambda: torch.mm(dense_x, dense_w.t())) for _ in range(3))
    median = {name: statistics.median(values) for name, values in times.items()}
    theirs = min(("eager", "grouped_mm", "batched_mm"), key=lambda n: median.get(n, math.inf))
    ours = [n for n in contestants if n not in ("eager", "grouped_mm", "batched_mm")]
    return {
        "milliseconds": {n: round(t * 1e3, 3) for n, t in median.items()},
        "best of transformers": theirs,
        "speed-up": {n: round(ratio(times, theirs, n), 3) for n in ours},
        "relative error": {n: float(f"{e:.1e}") for n, e in errors.items() if n != "eager"},
        "prepared": "packed" if report.packed else next(iter(report.shared.values())),
        "bytes of an expert": {n: _expert_bytes(contestants[n], n, shape, dtype) for n in ours},
        "dense matmul milliseconds": round(dense * 1e3, 3),
        "repetitions": len(times["plain"]),
    }


def _expert_bytes(run: Any, name: str, shape: tuple, dtype: torch.dtype) -> float:
    """Of weights, scales and mins; what a decoding step has to read of every active expert."""
    if name == "ternary":  # as it runs: two bits a weight and the levels
        return 3 * shape[0] * shape[1] / 4 + 4 * (2 * shape[1] + shape[0])
    if name in STORED:
        return sum(p.numel() * p.element_size() for p in run.parameters()) / shape[2]
    return 3 * shape[0] * shape[1] * (1 if name == "int8" else dtype.itemsize)


def training(shape: tuple, dtype: torch.dtype, module: Any, seconds: float) -> dict[str, Any]:
    hidden, _, experts, slots, tokens = shape
    weights = list(module.parameters())

    def step(twin: Any, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
        return twin(x, index, weight.requires_grad_())

    def both(twin: Any) -> Callable[..., None]:
        def run(index: torch.Tensor, weight: torch.Tensor) -> None:
            step(twin, index, weight).backward(torch.ones(tokens, hidden, dtype=dtype))
            for parameter in weights:
                parameter.grad = None

        return run

    twins = {"grouped_mm": sharing(module, "grouped_mm"), "plain": sharing(module, "moekit")}
    draw = lambda: routing(tokens, experts, slots, dtype)  # noqa: E731
    times = race({name: both(twin) for name, twin in twins.items()}, draw, seconds)
    kept = {name: saved_bytes(lambda t=twin: step(t, *draw()), weights) for name, twin in twins.items()}
    return {
        "milliseconds": {n: round(statistics.median(t) * 1e3, 3) for n, t in times.items()},
        "speed-up": round(ratio(times, "grouped_mm", "plain"), 3),
        "activation bytes": kept,
        "activation ratio": round(kept["plain"] / kept["grouped_mm"], 3),
        "repetitions": len(times["plain"]),
    }


def shares(shape: tuple, dtype: torch.dtype, result: dict[str, Any], bandwidth: float) -> dict[str, float]:
    """Share of the physical limit: FLOPs of one dense matmul (prefill), bytes of the active experts (decode)."""
    _, _, experts, slots, tokens = shape
    ours = {n: result["milliseconds"][n] for n in result["bytes of an expert"]}
    if tokens >= PREFILL_TOKENS:
        return {n: round(result["dense matmul milliseconds"] / t, 3) for n, t in ours.items()}
    if tokens > DECODE_TOKENS:
        return {}
    active = experts * (1 - (1 - slots / experts) ** tokens)
    size = {n: active * nbytes for n, nbytes in result["bytes of an expert"].items()}
    return {n: round(size[n] / (t / 1e3) / 1e9 / bandwidth, 3) for n, t in ours.items()}


def machine(bandwidth: float) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    half = {d: has_units(getattr(torch, d)) for d in ("bfloat16", "float16")}
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native half-precision units": half,
        "read bandwidth GB/s": round(bandwidth, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short timings, printed and not written")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shapes", help="indices into SHAPES, comma separated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a busy machine: processor, --threads 1")
    arguments = parser.parse_args()
    global clock
    clock = CLOCKS[arguments.clock]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    seconds = 0.5 if arguments.quick else 2.0
    bandwidth = read_bandwidth(torch.ones(16_384, 16_384))
    picked = [SHAPES[int(i)] for i in arguments.shapes.split(",")] if arguments.shapes else SHAPES
    cases = []
    for shape in picked:
        for dtype in (torch.float32, torch.bfloat16):
            if arguments.dtype and str(dtype) != f"torch.{arguments.dtype}":
                continue
            module = experts_module(*shape[:3], dtype)
            result = inference(shape, dtype, module, seconds)
            back = {} if arguments.no_training else training(shape, dtype, module, seconds)
            share = shares(shape, dtype, result, bandwidth)
            cases.append(
                {"shape": shape, "dtype": str(dtype)[6:], "inference": result, "training": back, "share": share}
            )
            print(json.dumps(cases[-1]), flush=True)
            del module
            gc.collect()
    if arguments.no_training:
        return
    record = {"machine": {**machine(bandwidth), "clock": arguments.clock}, "summary": summary(cases), "cases": cases}
    print(json.dumps(record["summary"], indent=2))
    if not arguments.quick and not arguments.shapes and not arguments.dtype:
        here = Path(__file__).parent
        (here / "experts.json").write_text(json.dumps(record, indent=1) + "\n")
        (here / "experts.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
