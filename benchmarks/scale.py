"""Compress a random checkpoint of a public model's true shapes inside a memory cap, timed against a plain copy.

    python benchmarks/scale.py --work DIR [--shapes olmoe|qwen3-30b] [--with reap:keep=0.5] [--max-ram 3GB] [--layers N]

The weights are random: figures are of speed, memory and bytes, never of quality. ``benchmarks/scale.json`` holds the
last run of each choice of shapes and methods.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

from moekit.lab import mini, text

RESULT = Path(__file__).with_name("scale.json")


def olmoe(layers: int) -> PretrainedConfig:
    """64 experts, top-8, hidden size 2048, experts 1024 wide; 16 layers are 13.8 GB in bfloat16."""
    return OlmoeConfig(num_hidden_layers=layers, num_experts=64, num_experts_per_tok=8, intermediate_size=1024)


def qwen3_30b(layers: int) -> PretrainedConfig:
    """128 experts, top-8, hidden size 2048, experts 768 wide; 48 layers are 61 GB in bfloat16."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    return Qwen3MoeConfig(num_hidden_layers=layers, head_dim=128, **sizes, **experts)


SHAPES = {"olmoe": (olmoe, 16, "OLMoE-1B-7B"), "qwen3-30b": (qwen3_30b, 4, "Qwen3-30B-A3B")}


def write_random_checkpoint(folder: Path, config: PretrainedConfig, seed: int = 0) -> int:
    """A checkpoint laid out as published; returns bytes of weights."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    for file in mini().glob("tokenizer*"):
        shutil.copy(file, folder)
    shapes, num_layers = {n: tuple(p.shape) for n, p in model.state_dict().items()}, config.num_hidden_layers
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


SPAWN = """
import json, os, sys
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
found = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9
open(sys.argv[1], "w").write(json.dumps(found))
"""
"""A process begins with its parent's peak as its own, and this one wrote gigabytes: the command has a small parent."""


def timed_child(command: list[str], note: Path) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak resident GB) of a command, as the operating system accounts them."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", SPAWN, str(note), *command], check=True)
    seconds = time.perf_counter() - start
    code, processor, peak = json.loads(note.read_text())
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}")
    return seconds, processor, peak


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
    parser.add_argument("--shapes", choices=list(SHAPES), default="olmoe")
    parser.add_argument("--layers", type=int, help="instead of 16 (olmoe) or 4 (qwen3-30b)")
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()
    methods = args.methods or ["reap:keep=0.5"]

    source, output = args.work / "source", args.work / "output"
    for old in (source, output):
        shutil.rmtree(old, ignore_errors=True)
    make, layers, name = SHAPES[args.shapes]
    layers = args.layers or layers
    size = write_random_checkpoint(source, make(layers))
    calibration = args.work / "calibration.txt"
    calibration.write_text(text("python", "calibration", max_bytes=args.max_tokens * 2))
    copy_seconds = timed_copy(source, args.work / "copy")

    command = [str(Path(sys.executable).with_name("moekit")), "compress", str(source), "--text", str(calibration)]
    command += ["--max-tokens", str(args.max_tokens), "--max-ram", args.max_ram, "--output", str(output)]
    command += [word for method in methods for word in ("--with", method)]
    seconds, processor, peak = timed_child(command, args.work / "usage.json")
    written = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    result = {
        "what": f"random weights at the true shapes of {name}: speed, memory and bytes only",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "layers": layers,
        "methods": methods,
        "max_ram": args.max_ram,
        "source_gb": round(size / 1e9, 2),
        "output_gb": round(written / 1e9, 2),
        "seconds": round(seconds, 1),
        "seconds_per_layer": round(seconds / layers, 1),
        "processor_seconds": round(processor, 1),
        "processor_seconds_per_layer": round(processor / layers, 1),
        "peak_rss_gb": round(peak, 2),
        "copy_seconds": round(copy_seconds, 1),
        "ratio_to_copy": round(seconds / copy_seconds, 2),
    }
    runs = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    runs[f"{args.shapes} {'/'.join(methods)}"] = result
    RESULT.write_text(json.dumps(runs, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
