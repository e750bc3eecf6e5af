"""Mixed requests against `moekit serve` under a cap: does memory grow, is any answer wrong?

    python benchmarks/sustained.py --minutes 10 --output benchmarks/sustained.json

The embedded model fits whole into the smallest cap there is, so a random one of 256 experts of 3.1 MB is made, and the
cap is the smallest that the server names and 60 MB. Three clients at once send prompts of many lengths, greedy or
sampled, streamed or whole, and some leave before the end. Every greedy answer is compared with that of the model with
all experts in memory, and what a client that left had heard with the beginning of it. The server's resident set is read
every second. Growth is the median of the last fifth minus that of the second fifth; the first fifth fills the cache.
Nothing here is a speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.run import prompt_ids
from moekit.stream import LoadedModel

CONTEXT, CLIENTS, ASKED = 256, 3, 40
MARGIN = 60_000_000
"""Bytes of cap above the smallest that is named: some experts, far from all."""
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
    "initializer_range": 0.06,
    "dtype": "bfloat16",
}


@dataclass
class Tally:
    """What clients saw, under one lock."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, tokens: int = 0, wrong: dict[str, str] | None = None) -> None:
        with self.lock:
            self.counts[kind] += 1
            self.tokens += tokens
            self.wrong += [wrong] if wrong else []


def make(folder: Path, seed: int) -> str:
    """A random model that speaks bytes, as the embedded one does."""
    torch.manual_seed(seed)
    OlmoeForCausalLM(OlmoeConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    Checkpoint.open("moekit:mini").tokenizer().save_pretrained(folder)
    return str(folder)


def answers(name: str, seed: int) -> list[tuple[str, int, str]]:
    """(prompt, most new tokens, greedy answer of the resident model), of many lengths."""
    checkpoint, draw = Checkpoint.open(name), random.Random(seed)
    model, tokenizer = LoadedModel.load(checkpoint).model, checkpoint.tokenizer()
    model.set_experts_implementation("moekit")
    text, made = lab.text("python", "test", 20_000, seed), []
    for _ in range(ASKED):
        start, new = draw.randrange(len(text) - 200), draw.choice((1, 4, 16, 48))
        prompt = text[start : start + draw.choice((1, 8, 30, 120))]
        ids = prompt_ids(tokenizer, prompt, chat=False)
        with torch.no_grad():
            out: Any = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        made.append((prompt, new, str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))))
    return made


def client(url: str, asked: list[tuple[str, int, str]], end: float, seed: int, tally: Tally) -> None:
    draw = random.Random(seed)
    with httpx.Client(timeout=300) as http:
        while time.monotonic() < end:
            prompt, new, expected = draw.choice(asked)
            greedy, streamed = draw.random() < 0.7, draw.random() < 0.6
            body = {
                "prompt": prompt,
                "max_tokens": new,
                "temperature": 0 if greedy else 0.8,
                "seed": draw.randrange(99),
            }
            leaves = draw.randrange(1, 6) if streamed and draw.random() < 0.3 else None
            kind = f"{'greedy' if greedy else 'sampled'}, {'streamed' if streamed else 'whole'}"
            try:
                said = heard(http, url, body, leaves) if streamed else whole(http, url, body)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                tally.add("failed", wrong={"prompt": prompt, "error": repr(error)})
                continue
            right = expected.startswith(said) if leaves else said == expected
            bad = {"prompt": prompt, "expected": expected, "said": said} if greedy and not right else None
            tally.add(kind + (", left" if leaves else ""), new, bad)


def whole(http: httpx.Client, url: str, body: dict[str, Any]) -> str:
    reply = http.post(f"{url}/v1/completions", json=body)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["text"])


def heard(http: httpx.Client, url: str, body: dict[str, Any], leaves: int | None) -> str:
    """What a stream says, up to so many events."""
    said, events = "", 0
    with http.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line == "data: [DONE]" or events == leaves:
                break
            if line:
                said, events = said + json.loads(line.removeprefix("data: "))["choices"][0]["text"], events + 1
    return said


def status(pid: int, name: str) -> int:
    """A figure of the operating system about a process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def smallest_cap(name: str) -> int:
    """What the server says it needs at least."""
    command = [sys.executable, "-m", "moekit.cli", "serve", name, "--context", str(CONTEXT), "--memory", "60MB"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    named = re.search(r"smallest cap that works is (?:about )?([\d.,]+) ?([MG])B", told)
    if named is None:
        raise SystemExit(f"no smallest cap was named: {told}")
    return int(float(named.group(1).replace(",", "")) * {"M": 1e6, "G": 1e9}[named.group(2)])


def experts(name: str, cap: int) -> dict[str, int]:
    """How many of the experts a process under that cap keeps in memory."""
    command = [sys.executable, "-m", "moekit.cli", "run", name, "x", "--new-tokens", str(CONTEXT - 1)]
    told = subprocess.run([*command, "--memory", str(cap), "--json"], capture_output=True, text=True, check=True)
    found = json.loads(told.stdout)
    return {"in memory": found["experts"], "of": found["all_experts"]}


def start(name: str, cap: int) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "moekit.cli", "serve", name, "--port", str(port), "--context", str(CONTEXT)]
    server, url = subprocess.Popen([*command, "--memory", str(cap)]), f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            httpx.get(f"{url}/health", timeout=5)
            return server, url
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(make(Path(folder) / "model", args.seed), args)
    args.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps({name: value for name, value in found.items() if "by the second" not in name}, indent=1))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    asked, cap = answers(name, args.seed), smallest_cap(name) + MARGIN
    server, url = start(name, cap)
    tally, resident, end = Tally(), list[int](), time.monotonic() + 60 * args.minutes
    clients = [threading.Thread(target=client, args=(url, asked, end, i, tally)) for i in range(CLIENTS)]
    try:
        for one in clients:
            one.start()
        while any(one.is_alive() for one in clients) and server.poll() is None:
            resident.append(status(server.pid, "VmRSS"))
            time.sleep(1)
        peak, alive = status(server.pid, "VmHWM"), server.poll() is None
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
    finally:
        server.kill()
    fifth = max(len(resident) // 5, 1)
    early, late = statistics.median(resident[fifth : 2 * fifth]), statistics.median(resident[-fifth:])
    return {
        "model": SIZES,
        "minutes": args.minutes,
        "cap": cap,
        "experts": experts(name, cap),
        "peak resident set": peak,
        "resident set, second fifth": early,
        "resident set, last fifth": late,
        "growth": late - early,
        "requests": dict(sorted(tally.counts.items())),
        "tokens asked for": tally.tokens,
        "wrong or failed": len(tally.wrong),
        "examples of these": tally.wrong[:5],
        "server alive to the end": alive,
        "exit code after SIGTERM": ended,
        "resident set by the second": resident[:: max(len(resident) // 60, 1)],
    }


if __name__ == "__main__":
    main()
