"""`torchrun`: two processes that share every batch learn what one does on the whole of it."""

import json
import subprocess
import sys

import torch
from safetensors.torch import load_file
from training import TINY_RECIPE

RECIPE = f"""{TINY_RECIPE}
steps = 3
[model.balance]
load = {{weight = 0.01, scope = "global"}}
"""
PROGRAM = """
import sys
from pathlib import Path
import torch
from moekit.train.recipe import Recipe
from moekit.train.trained import train_to
torch.set_num_threads(1)
folder = Path(sys.argv[1])
def batches(step):
    return {"input_ids": torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(step))}
train_to(Recipe.read(folder / "tiny.toml"), batches, folder / sys.argv[2])
"""


def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "program.py").write_text(PROGRAM)
    program = [str(tmp_path / "program.py"), str(tmp_path)]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *program, "one"], check=True, timeout=300)
    subprocess.run([*ranks, *program, "two"], check=True, timeout=300)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=2e-5), name
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["step"] for line in lines[1]] == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "program.py", "tiny.toml", "two"]
