"""Several processes on one job (``torchrun``): who does which layer, and waiting for one another.

What they make is exchanged as files in a folder that all of them see, never as objects over the network; collectives
only say when the files are there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def size() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; the one that writes outputs is 0."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def own(items: Sequence[T]) -> Sequence[T]:
    """This process's share of some work, dealt in turn."""
    return items[rank() :: size()]


def wait() -> None:
    """Until every process has come this far."""
    if size() > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        dist.barrier()
