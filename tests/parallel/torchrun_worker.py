"""What each of the processes of test_torchrun runs: `torchrun_worker.py FOLDER`; every answer is a file by rank."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moekit.contract import Routing
from moekit.lab.experiments._spread import bank, worst
from moekit.parallel import DispatchPlan, Engine, Layout, ParallelError, World, native, shard


def main(folder: Path) -> None:
    # the launcher ends the others once one has died: what this one has to say must be written first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world = World.join(patience=60.0)
    layout = Layout.contiguous(6, world.size)
    answers = {"size": world.size, "zero tokens": worst(Engine(world, layout), bank(6), "empty-rank")}
    answers["layout for 3"] = told(lambda: Engine(world, Layout.contiguous(6, 3)))
    other = DispatchPlan(Layout.contiguous(6, 3), ())
    answers["plan for 3"] = told(lambda: step(world, layout, lambda counts, of: other))
    answers["after mistakes"] = told(lambda: step(world, layout, native))
    dist.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    answers["killed"] = told(lambda: step(world, layout, native))
    (folder / f"{world.rank}.json").write_text(json.dumps(answers))
    sys.exit(3)


def step(world: World, layout: Layout, planner) -> None:
    """One batch through the experts."""
    index = torch.arange(6).unsqueeze(1)
    x = torch.ones(6, 6, dtype=torch.float64)
    Engine(world, layout, planner).run(shard(bank(6), layout, world.rank), x, Routing(index, index.double()))


def told(action) -> str:
    try:
        action()
    except ParallelError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
