"""Many batches through one model side by side, so that each layer is needed once.

A thread per batch runs the plain ``model(**batch)`` and is parked before every layer; the scheduler makes a layer
resident, lets each batch through it in turn, and frees it. One thread runs at any moment, so the order of operations
of each batch is exactly the model's own: whatever a family passes from layer to layer (masks by layer kind, caches,
router states, shared keys and values) travels in the thread's own stack and needs no knowledge here.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


class Residency(Protocol):
    """Who brings the weights: called by the scheduler, never by two threads at once."""

    def enter(self, stop: int) -> None:
        """Make the layer at this stop resident; everything but what it needs may go."""
        ...

    def leave(self, stop: int) -> None: ...


class _Cancelled(BaseException):
    """Unwinds a parked thread whose result nobody wants any more."""


class _Walker(threading.Thread):
    """One batch on its way. ``at`` is the stop it is parked before, None once it has ended."""

    def __init__(self, index: int, call: Callable[[], Any]) -> None:
        context = contextvars.copy_context()
        super().__init__(target=lambda: context.run(self._walk, call), name=f"batch-{index}", daemon=True)
        self.index = index
        self.at: int | None = -1
        self.result: Any = None
        self.error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._cancelled = False
        self._threads = torch.get_num_threads()

    def _walk(self, call: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                # Both settings belong to the thread; another number of threads would change how sums are split.
                torch.set_num_threads(self._threads)
                with torch.no_grad():
                    self.result = call()
        except _Cancelled:
            pass
        except BaseException as error:  # handed to the scheduler's thread, which raises it
            self.error = error
        finally:
            self.at = None
            self._stopped.release()

    def park(self, stop: int) -> None:
        self.at = stop
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def step(self) -> None:
        """Let it run to its next stop or its end."""
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self._cancelled = True
        if self.at is not None and self.is_alive():
            self._go.release()
            self._stopped.acquire()


def walk(
    model: nn.Module,
    stops: Sequence[nn.Module],
    residency: Residency,
    calls: Sequence[Callable[[], Any]],
    *,
    on_run: Callable[[int], None] = lambda index: None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tensor]:
    """Yield the result of each call in order; each call runs ``model`` and passes the ``stops``.

    ``on_run(index)`` says which call runs next; ``on_layer(done, total)`` is told of each finished stop. An error in
    any call ends all of them and is raised here. Closing the iterator early ends the threads.
    """
    walkers = [_Walker(index, call) for index, call in enumerate(calls)]
    by_thread: dict[int | None, _Walker] = {}

    def parker(stop: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if (walker := by_thread.get(threading.get_ident())) is not None:
                walker.park(stop)

        return hook

    hooks = [module.register_forward_pre_hook(parker(stop)) for stop, module in enumerate(stops)]

    def step(walker: _Walker) -> None:
        on_run(walker.index)
        walker.step()

    try:
        for walker in walkers:
            walker.start()
            by_thread[walker.ident] = walker
        for walker in walkers:
            step(walker)
        ready = 0
        while ready < len(walkers):
            waiting = [walker for walker in walkers if walker.at is not None]
            stop = min((walker.at for walker in waiting if walker.at is not None), default=len(stops))
            if waiting:
                residency.enter(stop)
            for walker in walkers[ready:]:
                if walker.at is not None and walker.at == stop:
                    step(walker)
                # A finished result leaves before the next batch makes its own: logits are large.
                while ready < len(walkers) and walkers[ready].at is None:
                    result, walkers[ready].result = walkers[ready].result, None
                    ready += 1
                    yield result
                    del result
            if waiting:
                residency.leave(stop)
                on_layer(stop + 1, len(stops))
    finally:
        for walker in walkers:
            walker.cancel()
        for hook in hooks:
            hook.remove()
