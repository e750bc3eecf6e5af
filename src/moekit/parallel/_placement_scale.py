"""The tables of docs/scale.md: what was measured on this machine, and what is modelled beyond it.

``python -m moekit.parallel._placement_scale docs/scale.md`` measures and writes them.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

from moekit.measure.machine import INTER, INTRA, CostModel, Law
from moekit.parallel._placement_shape import Shape, exchange_seconds, step_seconds

SHAPE = Shape(layers=58, hidden=7680, experts=256, top_k=8, inner=2048, shared=1)
"""The MoE layers of a model of some 700 billion parameters (the shape that Pangu Ultra MoE's simulator chose)."""
TOKENS = 4096
PER_NODE = 8
SIZES = (8, 16, 32, 64, 128, 256)
ASSUMED = CostModel(
    product=Law({"call": 5e-6, "flops": 1 / 400e12, "nbytes": 1 / 2e12}),
    disk=Law({"call": 1e-4, "nbytes": 1 / 5e9}),
    links={INTRA: Law({"call": 5e-6, "nbytes": 1 / 200e9}), INTER: Law({"call": 2e-5, "nbytes": 1 / 40e9})},
)
"""An accelerator with 400 TFLOP/s in products and 2 TB/s of memory, 200 GB/s between devices of a node and 40 GB/s per
device between nodes: round figures, nobody's data sheet."""

COLUMNS = ("devices P", "nodes", "experts per device", "their weights", "compute", "exchange", "exchange / compute")


def filled(page: str, cost: CostModel, when: str, machine: str) -> str:
    """The page with its two tables anew: what was measured, and what follows from the assumed laws."""
    tables = {"measured": measured(cost, when, machine), "modelled": modelled(ASSUMED)}
    for name, lines in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = before + begin + "\n".join(lines) + "\n" + end + after
    return page


def measured(cost: CostModel, when: str, machine: str) -> list[str]:
    """One line per fitted law, with its error."""
    laws = {
        "product of one thread": cost.product,
        "read past the page cache": cost.disk,
        "message between two processes": cost.links[INTRA],
    }
    lines = [f"`CostModel.fit()` on {when}, {machine}:", "", *_head("what", "latency", "rate", "error", "samples")]
    for name, law in laws.items():
        rates = ", ".join(_rate(what, rate) for what, rate in law.rates.items() if what != "call")
        latency, error = f"{law.rates['call'] * 1e6:.3g} us", f"{law.error:.0%} ({law.worst:.0%})"
        lines.append(f"| {name} | {latency} | {rates} | {error} | {law.samples} |")
    return lines


def _rate(what: str, rate: float) -> str:
    unit = "GFLOP/s" if what == "flops" else "GB/s"
    return f"{1e-9 / rate:.3g} {unit}" if rate > 0 else f"{unit} not limiting"


def modelled(laws: CostModel) -> list[str]:
    """One line per number of devices."""
    lines = ["All modelled:", "", *_head(*COLUMNS)]
    for devices in SIZES:
        nodes, own = devices // PER_NODE, SHAPE.experts // devices
        weights = 3 * SHAPE.hidden * SHAPE.inner * own * SHAPE.layers * 2
        compute = step_seconds(SHAPE, TOKENS, laws, devices, itemsize=2)
        exchange = exchange_seconds(SHAPE, TOKENS, laws, nodes, PER_NODE)
        times = f"{compute * 1e3:.0f} ms | {exchange * 1e3:.0f} ms | {exchange / compute:.2f}"
        lines.append(f"| {devices} | {nodes} | {own} | {weights / 1e9:.1f} GB | {times} |")
    return lines


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def main() -> None:
    """Measure, and fill in the page that is named."""
    path, machine = Path(sys.argv[1]), f"{platform.machine()}, {os.cpu_count()} cores"
    path.write_text(filled(path.read_text("utf-8"), CostModel.fit(), time.strftime("%Y-%m-%d"), machine), "utf-8")


if __name__ == "__main__":
    main()
