"""What each process of test_outer.py runs from beginning to end."""

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from outer_by_hand import SCHEDULES, WORLD
from outer_mistakes import left_alone, mistakes
from outer_workers import emulated, one_step_each, owned, really_in_flight, resumed, run_schedule, sharing


def work(rank, folder):
    """Entry of each process; writes what it found."""
    folder = Path(folder)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    found = {"schedules": {name: run_schedule(options, None) for name, options in SCHEDULES.items()}}
    found["one step"] = one_step_each()
    found["resumed"] = resumed(folder / f"state {rank}")
    found["in flight"] = really_in_flight(store)
    found["owned"], found["sharing"], found["emulated"] = owned(), sharing(), emulated()
    found["mistakes"] = mistakes(folder / f"state {rank}")
    (folder / f"found {rank}.json").write_text(json.dumps(found))
    found |= {"alone": left_alone(store)}
    (folder / f"found {rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the default group has lost a member: nothing is left to be said goodbye to
