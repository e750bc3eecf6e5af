"""Several processes plan together: the same bytes as one, and a killed one's layers are not made twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moekit import lab
from moekit.plan import Plan


def run(arguments: list[str], folder: Path, ranks: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """The command in as many processes as `torchrun` would start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "moekit.cli", *arguments],
            cwd=folder,
            env={**os.environ, **(shared if ranks > 1 else {"OMP_NUM_THREADS": "1"}), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    lines = lab.text("prose", "calibration", 20000, 3).split("\n\n")
    (folder / "notes.jsonl").write_text("".join(f'{{"text": {line!r}}}\n'.replace("'", '"') for line in _plain(lines)))
    return folder


def _plain(lines: list[str]) -> list[str]:
    return [" ".join("".join(c if c.isalnum() else " " for c in line).split()) for line in lines if len(line) > 80]


def test_two_processes_make_the_bytes_of_one(texts: Path) -> None:
    command = ["plan", "moekit:mini", "--with", "reap:keep=8", "--with", "gptq:bits=4", "--text", "notes.jsonl"]
    (alone,) = run([*command, "--output", "one.json"], texts)
    both = run([*command, "--output", "two.json"], texts, ranks=2)
    assert [alone.returncode, *(one.returncode for one in both)] == [0, 0, 0], (alone.stderr, both[0].stderr)
    assert both[1].stdout == ""
    assert Plan.load(texts / "one.json").layers == Plan.load(texts / "two.json").layers
    names = [{path.name for path in (texts / f"{plan}.values").iterdir()} for plan in ("one", "two")]
    assert names[0] == names[1]
    assert {name.rpartition(".")[2] for name in names[0]} == {"safetensors"}
