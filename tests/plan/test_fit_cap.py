"""`moekit fit --max-ram` from profile to verified output, in processes of its own: the cap it names is enough.

Kernels must have been compiled once before: compiling takes memory that no cap reckons with (see docs/log.md).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from moekit.lab import mini
from moekit.plan.receipt import Receipt

TEXT = "def mean(values):\n    return sum(values) / len(values)\n\n" * 10


def write_model(folder: Path) -> None:
    """166 MB of weights: more than half of what the named cap leaves, so that the model is streamed."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=512, intermediate_size=256, moe_intermediate_size=512, num_hidden_layers=6, num_experts=8,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_experts_per_tok=2, vocab_size=512,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for file in mini().glob("tokenizer*"):
        shutil.copy(file, folder)


def fit(folder: Path, cap: str) -> tuple[int, str, int]:
    """(exit code, what it said of trouble, peak resident bytes) of the command, as the operating system has them."""
    said = folder / "said.txt"
    words = ["fit", folder / "model", "--ratio", "0.5", "--text", folder / "text.txt", "--output", folder / "out"]
    command = [sys.executable, "-m", "moekit.cli", *map(str, words), "--max-ram", cap]
    streams = [(os.POSIX_SPAWN_OPEN, n, said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for n in (1, 2)]
    pid = os.posix_spawn(command[0], command, {**os.environ, "OMP_NUM_THREADS": "1"}, file_actions=streams)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(), usage.ru_maxrss * 1024


@pytest.mark.skipif("MOEKIT_SLOW" not in os.environ, reason="a minute; part of make claims")
def test_the_first_cap_it_names_is_enough_for_the_whole_command(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    code, said, _ = fit(tmp_path, "300MB")
    assert code == 2
    named = re.search(r"the smallest cap that works is (\d+)MB", said)
    assert named is not None, said
    cap = int(named[1]) * 10**6
    code, said, peak = fit(tmp_path, f"{named[1]}MB")
    assert code == 0, said
    receipt = Receipt.load(tmp_path / "out")
    assert receipt.run["max_ram_bytes"] == cap
    assert receipt.divergence is not None
    assert peak <= cap
