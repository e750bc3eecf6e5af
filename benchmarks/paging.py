"""Decoding with a fraction of the experts in memory: moekit's paging against transformers + accelerate disk offload.

    python benchmarks/paging.py --work DIR [--layers N] [--caps 1,0.5,0.25,0.125] [--tokens 16] [--sides A,B]

Both sides run the same tokens through the same checkpoint, each run in a process of its own under the same limit. Where
control groups can be made the limit is one of those, page cache included; elsewhere it is the resident set, and the
page cache is emptied before each run. The checkpoint has OLMoE-1B-7B's shapes and random weights whose routers are
planted: every token belongs to one of a few topics, topics last for a while, and routers prefer other experts for each
topic, some experts for all. ``benchmarks/paging.json`` holds the last run, ``paging.png`` its curves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scale import olmoe, write_random_checkpoint

RESULT = Path(__file__).with_name("paging.json")
TOPICS, STAY, PROMPT = 24, 0.95, 48
GROUP = Path("/sys/fs/cgroup/memory/moekit-paging")
BASE = 1_600_000_000
"""Bytes of every limit that are not for experts: Python with its libraries, the rest of the model, one context."""


def plant(folder: Path, seed: int = 0) -> None:
    """Write topics into a random checkpoint: embeddings that carry them, routers that read them.

    The strengths were chosen so that about half of a token's experts are its predecessor's, as ``repeats`` reports.
    """
    from moekit.checkpoint import Checkpoint

    checkpoint, rng = Checkpoint.open(folder), np.random.default_rng(seed)
    hidden = checkpoint.config["hidden_size"]
    topic_KH = np.linalg.qr(rng.standard_normal((hidden, TOPICS)))[0].T * hidden**0.5
    for name, info in checkpoint.tensors.items():
        if name == "model.embed_tokens.weight":
            topic_V = np.arange(info.shape[0]) % TOPICS
            value = 6 * topic_KH[topic_V] + 8 * rng.standard_normal(info.shape)
        elif name.endswith("mlp.gate.weight"):
            taste_EK = rng.standard_normal((info.shape[0], TOPICS)) + 0.5 * rng.standard_normal((info.shape[0], 1))
            value = (taste_EK @ topic_KH + 28 * rng.standard_normal(info.shape)) / hidden
        else:
            continue
        with (folder / info.file).open("r+b") as file:
            file.seek(info.offset)
            file.write(torch.from_numpy(value).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())


def tokens(count: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Ids [1, count]: a topic for a while, then another; within one, few tokens are common."""
    rng, topic, made = np.random.default_rng(seed), 0, []
    for _ in range(count):
        if rng.random() > STAY or not made:
            topic = int(rng.integers(TOPICS))
        word = min(int(rng.zipf(1.3)), vocabulary // TOPICS - 1)
        made.append(word * TOPICS + topic)
    return torch.tensor([made])


def decode(model: Any, ids: torch.Tensor, prompt: int) -> float:
    """Seconds for the tokens after the prompt, fed one by one."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        started = time.perf_counter()
        for at in range(prompt, ids.shape[1]):
            model(input_ids=ids[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - started


def paged(folder: Path, limit: int, ids: torch.Tensor, policy: str, ahead: int, seed: int) -> dict[str, Any]:
    """One run of moekit's side, begun with no expert in memory; then other tokens, with what is there by then."""
    from moekit.profile import TraceRecorder
    from moekit.run import load, paging
    from moekit.run._tier import Counters
    from moekit.run.answer import belady, fitting

    model = load(folder, limit, context=ids.shape[1], policy=policy, ahead=ahead)
    served = paging(model)
    decode(model, ids[:, : PROMPT + 2], PROMPT)
    served.store.clear(served.store.policy)
    served.history, served.store.counters = [], Counters()
    seconds = decode(model, ids, PROMPT)
    counters, requests, tier = replace(served.store.counters), list(served.history), served.store.layers[0]
    again = decode(model, tokens(ids.shape[1], 50304, seed + 1), PROMPT)
    found = {
        "seconds": seconds,
        "warm_tokens_per_second": (ids.shape[1] - PROMPT) / again,
        "hit_rate": counters.hit_rate,
        "belady": belady(served, requests),
        "experts": fitting(served),
        "read_bytes": counters.demand_bytes + counters.prefetch_bytes,
        "stall": counters.stall_seconds,
        "stall_bound": (counters.misses + counters.late) * tier.stored_bytes[0] / bandwidth(served),
    }
    with TraceRecorder(model) as recorder, torch.no_grad():
        model(input_ids=ids[:, : PROMPT * 2], use_cache=False)
    trace = recorder.trace()
    same = [
        np.isin(trace.expert[1:, i][t], trace.expert[:-1, i][t]).mean()
        for i in range(trace.num_layers)
        for t in range(len(trace) - 1)
    ]
    return found | {"repeats": float(np.mean(same))}


def bandwidth(served: Any) -> float:
    """Bytes per second of reading random experts with the store's own threads, nothing else going on."""
    from moekit.run import policy

    store = served.store
    store.clear(policy("lru"))
    rng, wanted = np.random.default_rng(1), 48
    before = store.counters.demand_bytes
    started = time.perf_counter()
    for _ in range(wanted // 8):
        layer = int(rng.integers(len(store.layers)))
        chosen = sorted(rng.choice(store.layers[layer].num_experts, 8, replace=False).tolist())
        store.begin(layer, chosen)
        store.need(layer, chosen)
        store.end()
    return (store.counters.demand_bytes - before) / (time.perf_counter() - started)


def offloaded(folder: Path, limit: int, ids: torch.Tensor, spill: Path) -> dict[str, Any]:
    """One run of accelerate's side: as many whole modules in memory as the limit holds, the others from disk."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": limit - BASE // 2},
        offload_folder=str(spill),
        local_files_only=True,
    )
    decode(model, ids[:, : PROMPT + 2], PROMPT)
    return {"seconds": decode(model, ids, PROMPT)}


def child(args: argparse.Namespace) -> None:
    """One run, in this process; prints its figures."""
    if GROUP.is_dir():
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    from moekit.stream import peak_rss

    ids = tokens(PROMPT + args.tokens, 50304, args.seed)
    folder = args.work / "planted"
    if args.side == "moekit":
        found = paged(folder, args.limit, ids, args.policy, args.ahead, args.seed)
    else:
        found = offloaded(folder, args.limit, ids, args.work / "spill")
    print(json.dumps(found | {"peak_gb": peak_rss() / 1e9, "tokens_per_second": args.tokens / found["seconds"]}))


@contextmanager
def limited(limit: int) -> Iterator[bool]:
    """A control group that holds at most ``limit`` bytes, page cache included; False where none can be made."""
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        GROUP.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with room for the checkpoint (14 GB)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--caps", default="1,0.5,0.25,0.125", help="shares of all experts")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--sides", default="moekit,accelerate")
    parser.add_argument(
        "--choices", default="lru:0,lru:8,score-aware:8,multi-term:8", help="moekit's policies, and experts ahead"
    )
    parser.add_argument("--seed", type=int, default=1)
    for hidden in ("--side", "--policy"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--limit", "--ahead"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        child(args)
        return
    folder = args.work / "planted"
    if not folder.exists():
        made = args.work / "making"
        shutil.rmtree(made, ignore_errors=True)
        write_random_checkpoint(made, olmoe(args.layers))
        plant(made)
        made.rename(folder)
    runs = list(measure(args, args.layers * 64 * 3 * 1024 * 2048 * 2))
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "layers": args.layers,
        "tokens": args.tokens,
        "runs": runs,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    draw(runs, args.layers)


def draw(runs: list[dict[str, Any]], layers: int) -> None:
    """Tokens per second and share of the best hit rate there could be, against the share of experts in memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    speed, hits = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(named(run) for run in runs)):
        own = sorted((run for run in runs if named(run) == name and "failed" not in run), key=lambda run: run["share"])
        shares = [100 * run["share"] for run in own]
        speed.plot(
            shares, [run["tokens_per_second"] for run in own], "o-", color=f"C{number}", label=name, markersize=4
        )
        if own and "belady" in own[0]:
            hits.plot(
                shares,
                [run["hit_rate"] / run["belady"] for run in own],
                "o-",
                color=f"C{number}",
                label=name,
                markersize=4,
            )
    speed.set(title=f"OLMoE's shapes, {layers} layers", ylabel="tokens per second", yscale="log")
    hits.set(title="hit rate over Belady's, who reads nothing ahead")
    for side in (speed, hits):
        side.set(xlabel="experts in memory, %")
    speed.legend(fontsize=7)
    figure.savefig(RESULT.with_suffix(".png"), dpi=120)


def named(run: dict[str, Any]) -> str:
    """What a curve is called."""
    return run["side"] if not run["policy"] else run["policy"] + (f" + {run['ahead']} ahead" if run["ahead"] else "")


def measure(args: argparse.Namespace, expert_bytes: int) -> Iterator[dict[str, Any]]:
    """Every side, choice and cap, each in a fresh process."""
    for share in map(float, args.caps.split(",")):
        limit = BASE + int(share * expert_bytes)
        jobs = [("accelerate", "", 0)] if "accelerate" in args.sides else []
        if "moekit" in args.sides:
            jobs += [("moekit", c.rpartition(":")[0], int(c.rpartition(":")[2])) for c in args.choices.split(",")]
        for side, policy, ahead in jobs:
            command = [sys.executable, __file__, "--work", str(args.work), "--side", side, "--limit", str(limit)]
            command += [
                "--policy",
                policy,
                "--ahead",
                str(ahead),
                "--tokens",
                str(args.tokens),
                "--seed",
                str(args.seed),
            ]
            forget(args.work / "planted")
            with limited(limit + limit // 20) as grouped:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            about = {
                "side": side,
                "share": share,
                "limit_gb": limit / 1e9,
                "policy": policy,
                "ahead": ahead,
                "group": grouped,
            }
            lines = (done.stderr or "killed").strip().splitlines() or ["killed"]
            run = about | (
                json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": lines[-1][:200]}
            )
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in run.items()}, flush=True)
            yield run


def forget(folder: Path) -> None:
    """Drop the checkpoint's pages from the operating system's cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
