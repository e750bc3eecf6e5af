"""What workers are told when they differ, go wrong or are left alone."""

import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from outer_by_hand import SCHEDULES, network
from outer_workers import synced

from moekit.errors import MoekitError
from moekit.parallel._outer_link import Link


def said(do):
    try:
        do()
    except MoekitError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mistakes(folder):
    """One line for each way in which workers may differ or go wrong."""
    found = {}

    def begin(options, done=0, change=0.0, **more):
        net = network()
        with torch.no_grad():
            next(net.parameters()).add_(change)
        synced(net, Link(), options, **more)(done + 1)

    rank, options = dist.get_rank(), SCHEDULES["four bits"]
    earlier = Path(f"{folder} earlier")
    earlier.mkdir()
    shutil.copy(folder / "outer-00000009.safetensors", earlier)
    found["schedule"] = said(lambda: begin({"every": 4 + (rank == 1)}))
    found["weights"] = said(lambda: begin({"every": 4}, change=float(rank == 2)))
    found["no folder"] = said(lambda: begin({"every": 4}, done=5))
    found["other step"] = said(lambda: begin(options, done=5, folder=folder))
    found["other run"] = said(lambda: begin({"every": 5}, done=9, folder=folder))
    late = {"done": 10, "folder": folder} if rank else {"done": 9, "folder": earlier}
    found["step"] = said(lambda: begin(options, **late))
    found["timeout"] = said(lambda: Link(timeout=0.0))
    with patch.object(dist, "get_backend", return_value="nccl"):
        found["nccl"] = said(Link)
    net = network()
    sync = synced(net, Link(), {"every": 4})
    sync(1)
    found["skipped"] = said(lambda: sync(3))
    with torch.no_grad():
        next(net.parameters()).mul_(float("nan"))
    found["not finite"] = said(lambda: [sync(step) for step in (2, 3, 4)])
    return found


def left_alone(store):
    """A worker that does not come, and one that is killed in the middle of an exchange."""
    late = dist.new_group(timeout=timedelta(seconds=30))
    rank, found = dist.get_rank(), {}
    if rank != 2:
        start = time.monotonic()
        found["late"] = said(lambda: Link(late, timeout=1.0).sum(torch.zeros(4), "fragment 0").take())
        found["late took"] = time.monotonic() - start
    dead = dist.new_group(timeout=timedelta(seconds=30))
    link = Link(dead, timeout=20)
    big = torch.zeros(2_000_000)
    if rank == 2:
        store.wait(["begun"], timedelta(seconds=20))
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    pending = link.sum(big, "fragment 1")
    store.set("begun", "yes")
    found["killed"] = said(pending.take)
    found["killed took"] = time.monotonic() - start
    found["afterwards"] = said(lambda: link.sum(big, "fragment 2").take())
    return found
