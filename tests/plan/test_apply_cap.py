"""Applying a plan to a checkpoint several times larger than the memory cap, in a process of its own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import torch
import transformers

CAP = 650_000_000
SCRIPT = """
import sys
from moekit.checkpoint import Checkpoint
from moekit.plan import LayerPlan, Plan, apply
source = Checkpoint.open(sys.argv[1])
half = {layer.name: LayerPlan.keep(range(0, 64, 2), 64) for layer in source.moe_layers}
apply(source, Plan(source=source.fingerprint, layers=half), sys.argv[2], max_ram=int(sys.argv[3]))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def write_hollow(folder: Path) -> int:
    """A checkpoint of 2 GB whose data are holes in the file: zeros that take no disk. Returns its bytes of weights."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=512, moe_intermediate_size=256, num_hidden_layers=40, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_experts=64, num_experts_per_tok=4, vocab_size=128, architectures=["Qwen3MoeForCausalLM"],
        dtype=torch.bfloat16,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in transformers.Qwen3MoeForCausalLM(config).state_dict().items()}
    for name in [name for name in shapes if ".experts." in name]:
        owner, _, part = name.rpartition(".")
        experts, rows, columns = shapes.pop(name)
        for expert in range(experts):
            for leaf in ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",):
                shapes[f"{owner}.{expert}.{leaf}.weight"] = [rows // (2 if leaf != "down_proj" else 1), columns]
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    blob = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        file.truncate(8 + len(blob) + offset)
    return offset


def test_a_checkpoint_three_times_the_cap(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    size = write_hollow(tmp_path / "source")
    assert size > 3 * CAP
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "source"), str(tmp_path / "out"), str(CAP)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The process's own high-water mark: getrusage would count what the parent held before exec.
    assert 1024 * int(done.stdout) <= CAP
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size * 0.45 < written < size * 0.6
