"""`moekit fit --max-ram` from profile to verified output, in processes of its own: the cap it names is enough.

No kernel is compiled beforehand: what compiling takes has to fit as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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


LAUNCHER = """
import os, sys
said, *command = sys.argv[1:]
out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
pid = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out, n) for n in (1, 2)])
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""
"""A process that is spawned begins with its parent's peak, so its parent has to be small: this one, not pytest."""


def fit(folder: Path, cap: str) -> tuple[int, str, int]:
    """(exit code, what it said of trouble, peak resident bytes) of the command, as the operating system has them."""
    said = folder / "said.txt"
    words = ["fit", folder / "model", "--ratio", "0.5", "--text", folder / "text.txt", "--output", folder / "out"]
    command = [sys.executable, "-m", "moekit.cli", *words, "--max-ram", cap]
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, said, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder / "kernels")},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    code, peak = map(int, done.stdout.split())
    return code, said.read_text(), peak


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
