"""Compress a random checkpoint of a public model's true shapes inside a memory cap, timed against a plain copy.

    python benchmarks/scale.py --work DIR [--with reap:keep=0.5] [--max-ram 3GB] [--layers 16]

The weights are random: figures are of speed, memory and bytes, never of quality. Writes ``benchmarks/scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moekit.lab import mini, text

RESULT = Path(__file__).with_name("scale.json")


def write_random_checkpoint(folder: Path, num_layers: int, seed: int = 0) -> int:
    """OLMoE-1B-7B's shapes (64 experts, top-8, hidden 2048, bf16) as published; returns bytes of weights."""
    folder.mkdir(parents=True)
    config = OlmoeConfig(num_hidden_layers=num_layers, num_experts=64, num_experts_per_tok=8, intermediate_size=1024)
    config.architectures, config.dtype = ["OlmoeForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    for file in mini().glob("tokenizer*"):
        shutil.copy(file, folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in OlmoeForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weight_map, total = {}, 0
    units = [f"model.layers.{i}." for i in range(num_layers)] + [""]
    for number, prefix in enumerate(units, 1):
        chosen = [n for n in shapes if n.startswith(prefix) and (prefix or not n.startswith("model.layers."))]
        tensors = {key: shape for name in chosen for key, shape in on_disk(name, shapes[name])}
        file = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        total += write_shard(folder / file, tensors, generator)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def on_disk(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published checkpoints of this shape keep every expert apart; the model in memory stacks them."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj") or not stem.endswith("experts"):
        yield name, shape
        return
    for expert in range(shape[0]):
        for part in ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",):
            rows = shape[1] // 2 if leaf == "gate_up_proj" else shape[1]
            yield f"{stem}.{expert}.{part}.weight", (rows, shape[2])


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], generator: torch.Generator) -> int:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    blob = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(blob)) + blob)
        for name, shape in tensors.items():
            is_norm = "norm" in name
            value = torch.ones(shape) if is_norm else torch.randn(shape, generator=generator) * 0.02
            out.write(value.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return offset


def timed_child(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak resident GB) of a command, as the operating system accounts them."""
    start = time.perf_counter()
    pid = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} ended with {code}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def timed_copy(source: Path, target: Path) -> float:
    """Seconds to copy the same bytes and have them on the disk."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with room for three times the checkpoint")
    parser.add_argument("--with", dest="methods", action="append", help="method, as for moekit compress")
    parser.add_argument("--max-ram", default="3GB")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()
    methods = args.methods or ["reap:keep=0.5"]

    source, output = args.work / "source", args.work / "output"
    for old in (source, output):
        shutil.rmtree(old, ignore_errors=True)
    size = write_random_checkpoint(source, args.layers)
    calibration = args.work / "calibration.txt"
    calibration.write_text(text("python", "calibration", max_bytes=args.max_tokens * 2))
    copy_seconds = timed_copy(source, args.work / "copy")

    command = [str(Path(sys.executable).with_name("moekit")), "compress", str(source), "--text", str(calibration)]
    command += ["--max-tokens", str(args.max_tokens), "--max-ram", args.max_ram, "--output", str(output)]
    command += [word for method in methods for word in ("--with", method)]
    seconds, peak = timed_child(command)
    written = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    result = {
        "what": "random weights at the true shapes of OLMoE-1B-7B: speed, memory and bytes only",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": os.cpu_count()},
        "layers": args.layers,
        "methods": methods,
        "max_ram": args.max_ram,
        "source_gb": round(size / 1e9, 2),
        "output_gb": round(written / 1e9, 2),
        "seconds": round(seconds, 1),
        "peak_rss_gb": round(peak, 2),
        "copy_seconds": round(copy_seconds, 1),
        "ratio_to_copy": round(seconds / copy_seconds, 2),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
