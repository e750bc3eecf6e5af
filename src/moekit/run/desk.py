"""One model, many who ask: requests wait in a short line and are answered one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moekit.errors import MoekitError
from moekit.run.answer import Cost, answer


class BusyError(MoekitError):
    """The line is full."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What to go on from, and how. ``ids`` [1, S]; ``stops`` are texts at which the answer ends, themselves left out.

    The callbacks run in the desk's thread: ``say`` with each piece of text as soon as it is certain to belong to the
    answer, then either ``done`` with why it ended ("stop" or "length") and what it took, or ``failed``. Once ``left``
    is set nobody listens any more, and the answer ends at its next token.
    """

    ids: Tensor
    new_tokens: int
    say: Callable[[str], None]
    done: Callable[[str, Cost], None]
    failed: Callable[[Exception], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    left: threading.Event = field(default_factory=threading.Event)


class Desk:
    """Answers requests in the order they came; at most ``waiting`` stand in line behind the one being answered.

    ``counters`` of the model's store are the last answer's. :meth:`close` answers what is in line and then stops;
    ``at_once`` lets the present answer end at its next token and drops the others.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, waiting: int = 16) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._line: queue.Queue[Request | None] = queue.Queue()
        self._places = threading.Semaphore(waiting + 1)
        self._closed, self._hurry = False, threading.Event()
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> None:
        """Put a request in line. Raises :class:`BusyError` where the line is full or the desk is closed."""
        if self._closed:
            raise BusyError("the server is shutting down")
        if not self._places.acquire(blocking=False):
            raise BusyError("too many requests are waiting: try again later")
        self._line.put(request)

    def close(self, at_once: bool = False, timeout: float | None = None) -> None:
        """Take no more requests and wait until the line is empty."""
        self._closed = True
        if at_once:
            self._hurry.set()
        self._line.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        while (request := self._line.get()) is not None:
            try:
                if self._hurry.is_set():
                    raise BusyError("the server is shutting down")
                if not request.left.is_set():
                    self._answer(request)
            except Exception as error:  # whatever it is, whoever asked must hear of it, and the next one be served
                request.failed(error)
            finally:
                self._places.release()

    def _answer(self, request: Request) -> None:
        spoken = _Spoken(request)
        _, cost = answer(
            self.model,
            request.ids,
            request.new_tokens,
            tokenizer=self.tokenizer,
            say=spoken,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=lambda: spoken.over or request.left.is_set() or self._hurry.is_set(),
        )
        spoken.finish()
        whole = cost.new_tokens >= request.new_tokens and not spoken.over
        request.done("length" if whole else "stop", cost)


class _Spoken:
    """Passes text on up to the first stop, holding back what may be the beginning of one."""

    def __init__(self, request: Request) -> None:
        self.request, self.over = request, False
        self._held = ""

    def __call__(self, text: str) -> None:
        if self.over:
            return
        self._held += text
        ends = [at for stop in self.request.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.over = True
            self._pass(min(ends))
            self._held = ""
            return
        self._pass(len(self._held) - max((_begun(self._held, stop) for stop in self.request.stops), default=0))

    def finish(self) -> None:
        self._pass(len(self._held))

    def _pass(self, end: int) -> None:
        if end:
            self.request.say(self._held[:end])
            self._held = self._held[end:]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
