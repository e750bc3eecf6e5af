"""One process among many that trains as if it were alone: libraries that would join in do not see the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_SAID = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
"""Environment variables by which torchrun and MPI tell a process that it has siblings."""


@contextmanager
def apart() -> Iterator[None]:
    """Within it, transformers' Trainer trains this process's model alone and averages no gradients with the others.

    Enter it after ``torch.distributed.init_process_group`` and before the first Trainer (or :func:`moekit.train.train`)
    of the process: accelerate decides once what it is part of.
    """
    hidden = {name: os.environ.pop(name) for name in _SAID if name in os.environ}
    talkative = logging.getLogger("transformers.training_args")  # it warns of a group that its Trainer does not use
    level = talkative.level
    talkative.setLevel(logging.ERROR)
    try:
        yield
    finally:
        talkative.setLevel(level)
        os.environ.update(hidden)
