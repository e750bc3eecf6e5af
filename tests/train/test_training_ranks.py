"""`torchrun`: two processes that share every batch learn what one does on the whole of it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training import TINY_RECIPE

import moekit.train.loop as loop
from moekit.errors import OptionError
from moekit.train.recipe import Recipe
from moekit.train.trained import train_to

RECIPE = f"""{TINY_RECIPE}
steps = 6
[model.balance]
"""
BALANCE = 'load = {weight = 0.01, scope = "global"}'
PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
import moekit.train.loop as loop
from moekit.train.recipe import Recipe
from moekit.train.trained import train_to
torch.set_num_threads(1)
loop.SAVE_EVERY = 2
folder, die = Path(sys.argv[1]), int(sys.argv[3])
def batches(step):
    return {"input_ids": torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(step))}
def uneven(step):
    return batches(step) | {"attention_mask": (torch.arange(12) < torch.tensor([[12], [3], [9], [5]])).long()}
def progress(step, steps):
    if step == die and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
train_to(Recipe.read(folder / "tiny.toml"), batches, folder / sys.argv[2], progress=progress)
if die == 0:
    train_to(Recipe.read(folder / "plain.toml"), uneven, folder / f"{sys.argv[2]}-uneven")
"""
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `one` and `one-uneven`, trained by one process."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.toml").write_text(RECIPE + BALANCE)
    (folder / "plain.toml").write_text(RECIPE + "load = 0.0")
    (folder / "program.py").write_text(PROGRAM)
    assert call(folder, "one") == 0
    return folder


def batches(step):
    return {"input_ids": torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(step))}


def call(folder, name, *, die=0, how=()):
    """The exit status of a training that is killed after a step, by one process or as `how` says."""
    program = [str(folder / "program.py"), str(folder), name, str(die)]
    done = subprocess.run([sys.executable, *how, *program], check=False, timeout=300, capture_output=True)
    return done.returncode


def same(folder, first, name):
    """Whether a training learnt what the first did, and wrote down the same course."""
    one, other = (load_file(folder / which / "model.safetensors") for which in (first, name))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor, other[key], atol=2e-5), key
    lines = [
        [json.loads(line) for line in (folder / which / "metrics.jsonl").read_text().splitlines()]
        for which in (first, name)
    ]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(*lines, strict=True):
        assert mine["load"] == theirs["load"]
        for part in ("loss", "cross_entropy", "max_violation", "variation", "dead"):
            assert mine[part] == pytest.approx(theirs[part], abs=1e-4), part
    assert {path.name for path in (folder / name).iterdir()} == {path.name for path in (folder / first).iterdir()}


def test_two_ranks_are_one_process_on_the_whole_batch(folder):
    """Also where their shares are not equally many tokens."""
    assert call(folder, "two", how=RANKS) == 0
    same(folder, "one", "two")
    same(folder, "one-uneven", "two-uneven")


def test_killed_they_go_on_from_the_same_step_be_they_one_or_two(folder):
    assert call(folder, "killed", die=3) == -9
    assert call(folder, "killed", die=5, how=RANKS) != 0
    assert (folder / ".killed.training" / "resume.safetensors").is_file()
    assert call(folder, "killed", how=RANKS) == 0
    same(folder, "one", "killed")
    assert not list(folder.glob(".*"))


def test_ranks_that_find_different_states_say_so(folder, monkeypatch):
    """Each in a folder of its own, of which one holds a run."""

    def stop(step, steps):
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        train_to(Recipe.read(folder / "tiny.toml"), batches, folder / "apart0", progress=stop)
    apart = PROGRAM.replace("folder / sys.argv[2]", "folder / f\"{sys.argv[2]}{os.environ['RANK']}\"")
    (folder / "apart.py").write_text(apart)
    program = [str(folder / "apart.py"), str(folder), "apart", "0"]
    done = subprocess.run([sys.executable, *RANKS, *program], check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode != 0
    assert "at the steps [2, 0]: give a folder that all of them see" in done.stderr


def test_one_process_agrees_with_itself(tmp_path):
    loop._agree(3, 1, tmp_path)
    loop._agree(3, 2, None)


def test_steps_that_differ_are_refused(tmp_path, monkeypatch):
    def gather(found, done):
        found[:] = [4, done]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    loop._agree(4, 2, tmp_path)
    with pytest.raises(OptionError, match=r"at the steps \[4, 0\]: give a folder that all of them see"):
        loop._agree(0, 2, tmp_path)
