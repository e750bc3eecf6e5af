"""Two processes that torchrun started: a rank without tokens, plans for other ranks, and one that is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

LIMIT = 240
"""Seconds after which everything here is ended and the test fails: nothing may hang."""


def test_faults_under_torchrun(tmp_path):
    """One launch for all: its processes take seconds to start. What a rank was told is in its file."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "0"]
    script = Path(__file__).with_name("torchrun_worker.py")
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode != 0, done.stderr
    assert "SIGKILL" in done.stderr or "-9" in done.stderr, done.stderr
    found = json.loads((tmp_path / "0.json").read_text())
    assert not (tmp_path / "1.json").exists()
    assert found["size"] == 2
    assert max(found["zero tokens"].values()) < 1e-12
    assert "this layout is for 3 ranks, but 2 take part" in found["layout for 3"]
    assert "this plan is for 3 ranks, but 2 take part: make it for the ranks there are" in found["plan for 3"]
    assert found["after mistakes"] == ""
    assert "rank 0 of 2 lost its peers while" in found["killed"]
    assert "stop all ranks and start them again" in found["killed"]
