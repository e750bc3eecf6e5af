"""Several processes plan together: the same bytes as one, and a killed one's layers are not made twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commanding import call, make_model

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


KILLED = """
import os, signal, sys
from moekit.cli import main
from moekit.compress.gptq import Gptq

planned, real = [], Gptq.plan_layer

def plan_layer(self, layer, bank, site):
    planned.append(site.name)
    if os.environ["RANK"] == "1" and len(planned) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, layer, bank, site)

Gptq.plan_layer = plan_layer
main(sys.argv[1:])
"""


def torchrun(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two processes, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = [*command, *map(str, arguments)]
    return subprocess.run(made, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def test_a_killed_rank_is_taken_up_again_and_a_search_by_two_is_a_search_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", num_hidden_layers=4)
    (tmp_path / "notes.txt").write_text(lab.text("arithmetic", "calibration", 2500))
    (tmp_path / "killed.py").write_text(KILLED)
    methods = ["--with", "eep:keep=6,evaluations=8,discrete=4,initial=2", "--with", "gptq:bits=4,group_size=16"]
    seen = tmp_path / "seen.profile"  # of the text itself, parts add up to the whole but for the last bits of sums
    assert call("profile", "model", "--text", "notes.txt", "--sample", "256", "--output", seen)[0] == 0
    command = ["plan", "model", *methods, "--profile", seen.name]

    stopped = torchrun("killed.py", *command, "--output", "two.json", folder=tmp_path)
    assert stopped.returncode != 0
    assert "Signal 9" in stopped.stderr
    assert not (tmp_path / "two.json").exists()
    values = tmp_path / "two.values"
    kept = {path.name: path.stat().st_ino for path in values.glob("*.safetensors")}
    assert 1 <= len(kept) < 4
    (journal,) = values.glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 8

    done = torchrun("-m", "moekit.cli", *command, "--output", "two.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.json") == 1
    assert call(*command, "--output", "one.json")[0] == 0
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / f"{n}.values").iterdir()} for n in ("one", "two"))
    assert one == two
    assert len(one) == 4
    again = [name for name, inode in kept.items() if (values / name).stat().st_ino != inode]
    assert len(again) <= 1  # the one that was being noted when the rank was killed; the others are not made again
