"""Two processes that send bytes to each other and back: what a message between devices of one node costs here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from moekit.errors import OptionError

_LIMIT = 60.0
"""Seconds after which two processes that do not find each other are given up."""


def round_trips(sizes: Sequence[int], repeats: int) -> list[float]:
    """Seconds of one message of each size, the fastest of ``repeats``.

    Raises OptionError where the two processes fail or do not end within a minute.
    """
    with tempfile.TemporaryDirectory() as place:
        orders = json.dumps({"sizes": list(sizes), "repeats": repeats, "place": place})
        both = [
            subprocess.Popen([sys.executable, "-P", __file__, str(rank), orders], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            errors = [one.communicate(timeout=_LIMIT)[1] for one in both]
        except subprocess.TimeoutExpired:
            errors = [f"no answer within {_LIMIT:.0f} s"]
        finally:
            for one in both:
                one.kill()
                one.wait()
        found = Path(place) / "seconds.json"
        if not found.is_file():
            last = " ".join(errors).strip().splitlines()[-1:] or ["no reason given"]
            raise OptionError(f"two processes could not exchange messages ({last[0]}): is gloo available here?")
        return list(json.loads(found.read_text()))


def _exchange(rank: int, sizes: Sequence[int], repeats: int, place: Path) -> None:
    """What each of the two does; the first writes the seconds."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=_LIMIT)
    )
    seconds = []
    for size in sizes:
        data, taken = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(repeats + 1):
            dist.barrier()
            begun = time.perf_counter()
            for sender in (0, 1):
                (dist.send if rank == sender else dist.recv)(data, 1 - rank)
            taken.append(time.perf_counter() - begun)
        seconds.append(min(taken[1:]) / 2)
    if rank == 0:
        (place / "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    orders = json.loads(sys.argv[2])
    _exchange(int(sys.argv[1]), orders["sizes"], orders["repeats"], Path(orders["place"]))
