"""Real gloo processes that are started once and then asked things: no test waits longer than its patience."""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from datetime import timedelta
from typing import Any

PATIENCE = 120
LOST = (f"no answer within {PATIENCE} s", "died")


class Ranks:
    """``size`` worker processes; ``ask(module, function, *args)`` runs the function in all of them at once."""

    def __init__(self, size: int, folder: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, str(folder / f"meet{size}"), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, module: str, function: str, *args: Any) -> list[Any]:
        """What the function returned on every rank; raises RuntimeError with the trace of the first that failed."""
        if not all(process.is_alive() for process in self.processes):
            raise RuntimeError("the ranks were stopped when an earlier question failed")
        for pipe in self.pipes:
            pipe.send((module, function, args))
        answers = [self._answer(rank) for rank in range(len(self.pipes))]
        self.first = answers[0][1]
        lost = [answer for ok, answer in answers if answer in LOST and not ok]
        if lost:
            self.close()
        failed = [f"rank {rank}: {answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [answer for _, answer in answers]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self.pipes[rank].poll(PATIENCE):
            return False, LOST[0]
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return False, LOST[1]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join(5)


def _work(rank: int, size: int, meet: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            module, function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(importlib.import_module(module), function)(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
