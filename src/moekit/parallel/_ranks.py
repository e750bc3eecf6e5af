"""Processes on this machine that work together: started once, then asked to run functions, for experiments and tests.

On a cluster ``torchrun`` starts the ranks instead.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, Self

from moekit.parallel._errors import ParallelError

STOPPED = "these ranks were stopped when an earlier question failed: start new ones"


class LocalRanks:
    """``size`` gloo processes with ``threads`` threads each, as a context manager.

    No question waits longer than ``patience`` seconds. A rank that dies or stays silent ends all of them: what the
    others were in the middle of cannot be finished.
    """

    def __init__(self, size: int, threads: int = 1, patience: float = 120.0) -> None:
        context = _context()
        self.patience = patience
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="moekit-ranks-")
        meet = (Path(self._folder.name) / "meet").as_uri()
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, meet, threads, patience, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a module-level function returns on every rank, run by all of them at once.

        Raises ParallelError with the trace of the first rank that failed, died or did not answer.
        """
        if not all(process.is_alive() for process in self.processes):
            raise ParallelError(STOPPED)
        for pipe in self.pipes:
            try:
                pipe.send((function, args))
            except OSError:  # it was still dying when it was looked at
                self.close()
                raise ParallelError(STOPPED) from None
        answers: dict[int, Any] = {}
        until = time.monotonic() + self.patience
        while len(answers) < len(self.pipes):
            waiting = [rank for rank in range(len(self.pipes)) if rank not in answers]
            ready = wait([self.pipes[rank] for rank in waiting], max(0.0, until - time.monotonic()))
            if not ready:
                self._fail(waiting[0], f"did not answer within {self.patience:g} s")
            for rank in (rank for rank in waiting if self.pipes[rank] in ready):
                answers[rank] = self._answer(rank)
        return [answers[rank] for rank in range(len(self.pipes))]

    def _answer(self, rank: int) -> Any:
        try:
            fine, answer = self.pipes[rank].recv()
        except EOFError:
            self._fail(rank, "died")
        if not fine:
            self._fail(rank, answer)
        return answer

    def _fail(self, rank: int, how: str) -> NoReturn:
        self.close()
        raise ParallelError(f"rank {rank} of {len(self.pipes)} {how}")

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join(5)
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _context() -> Any:
    """Fork from a server that has imported torch, where there is one: ranks then start at once, not in seconds each."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "moekit.parallel"])
    return context


def _work(rank: int, size: int, meet: str, threads: int, patience: float, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    bounded = timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=bounded)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, f"failed: {traceback.format_exc()}"))
