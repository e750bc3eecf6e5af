"""The record of a run of experts.py: means over the shapes, and the page that people read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for dtype in [*sorted({c["dtype"] for c in cases}), "both"]:
        mine = [c for c in cases if dtype in (c["dtype"], "both")]
        names = {n for c in mine for n in c["inference"]["speed-up"]}
        out[dtype] = {
            "speed-up, geometric mean": {
                n: round(geometric_mean([s[n] for c in mine if n in (s := c["inference"]["speed-up"])]), 3)
                for n in sorted(names)
            },
            "plain, worst shape": min(c["inference"]["speed-up"]["plain"] for c in mine),
            "forward + backward, geometric mean": round(geometric_mean([c["training"]["speed-up"] for c in mine]), 3),
            "forward + backward, worst shape": min(c["training"]["speed-up"] for c in mine),
            "activation ratio, worst shape": max(c["training"]["activation ratio"] for c in mine),
            "int8 error, worst shape": max(c["inference"]["relative error"]["int8"] for c in mine),
        }
    return out


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def markdown(record: dict[str, Any]) -> str:
    cases, about = record["cases"], record["machine"]
    names = ["plain", "prepared", "int8"]
    packs = [f"packed {bits} bit" for bits in ("8", "4", "3", "2", "1", "1-8")]
    packs += [*(f"nested {bits} bit" for bits in (2, 3, 4, 8)), "ternary"]
    packed = [["H, I, E, k, T", "bfloat16 (ms)", *(name.removeprefix("packed ") for name in packs)]]
    tokens = [["H, I, E, k, T", "bfloat16", *packed[0][2:]]]
    speed = [["H, I, E, k, T", "dtype", "transformers' best (ms)", *names]]
    train = [
        ["H, I, E, k, T", "dtype", "grouped_mm (ms)", "moekit", "activation bytes", "limit: plain", "prepared", "int8"]
    ]
    for case in cases:
        key = [", ".join(map(str, case["shape"])), case["dtype"]]
        run, back, share = case["inference"], case["training"], case["share"]
        best = run["best of transformers"]
        cells = [f"{run['speed-up'][n]:.2f}x" if n in run["speed-up"] else "" for n in names]
        speed.append([*key, f"{best} {run['milliseconds'][best]:.2f}", *cells])
        if packs[0] in run["speed-up"]:
            ours = [f"{run['speed-up'][n]:.2f}x" + (f" ({share[n]:.0%})" if n in share else "") for n in packs]
            packed.append([key[0], f"{run['milliseconds'][best]:.2f}", *ours])
            rate = [f"{case['shape'][4] / run['milliseconds'][n] * 1e3:.0f}" for n in (best, *packs)]
            tokens.append([key[0], *rate])
        limit = [f"{share[n]:.0%}" if n in share else "" for n in names]
        times = [
            f"{back['milliseconds']['grouped_mm']:.1f}",
            f"{back['speed-up']:.2f}x",
            f"{back['activation ratio']:.2f}x",
        ]
        train.append([*key, *times, *limit])
    lines = [
        "# Expert kernels, side by side",
        "",
        f"{about['cpu']}, {about['threads']} threads, {about['clock']} time, {about['capability']}; "
        f"native half-precision units: {about['native half-precision units']}; "
        f"torch {about['torch']}, transformers {about['transformers']}; "
        f"read bandwidth {about['read bandwidth GB/s']} GB/s. Random weights and routings. Written by `make bench`.",
        "",
        "## Forward: speed-up over the best of transformers' own backends on each shape",
        "",
        table(speed),
        "",
        "## Stored formats against bfloat16 of the same shapes",
        "",
        "Packed integers in groups of 64 (1-8 mixes 1, 2, 4 and 8 bits between experts), nested planes on a base of 2 "
        "bits in groups of 64, ternary as it runs, at two bits a weight. In brackets the share of the limit below, "
        "counting every active expert's bytes once.",
        "",
        table(packed),
        "",
        "Tokens per second of one layer:",
        "",
        table(tokens),
        "",
        "## Forward + backward against grouped_mm, and the share of the physical limit (forward)",
        "",
        "Limit: one dense matmul of the same FLOPs and dtype from 256 tokens on; bytes of the active experts over the "
        "measured read bandwidth up to 8 tokens.",
        "",
        table(train),
        "",
        "## Over all shapes",
        "",
        "```json",
        json.dumps(record["summary"], indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)
