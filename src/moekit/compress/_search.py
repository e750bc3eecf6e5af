"""Searching plans by what they are measured to cost: an archive that only grows, from one seed, that can be resumed.

A search is a pure function of its seed and of the losses it is told. So a journal of losses, one line per measurement,
is all that an interrupted search needs: run again, it draws the same plans, is told at once what is known, and measures
on from where it was, to the same end. The journal lies where planners keep computed values (``plan.values.spooling``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from moekit.errors import OutputError, PlanError
from moekit.plan import ranks, values
from moekit.plan.document import Plan
from moekit.plan.planner import Evaluate

G = TypeVar("G")
FORMAT, VERSION = "moekit-search", 1
TOLERANCE = 1e-4
"""How far, relatively, a plan may measure from what a journal says of it before the two are about different things."""
DRAWS = 100
"""How often a plan that was measured before is drawn again."""

Progress = Callable[[int, int], None]
_PROGRESS: ContextVar[Progress | None] = ContextVar("moekit_search", default=None)


@contextmanager
def searching(progress: Progress) -> Iterator[None]:
    """Searches inside tell ``progress`` how many plans are measured, and how many are to be."""
    token = _PROGRESS.set(progress)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


@contextmanager
def in_turn() -> Iterator[None]:
    """Of several processes on one job the first searches, the others wait for it and then follow its journal."""
    follows, shared = ranks.rank() > 0, values.spool() is not None
    if follows and shared:
        ranks.wait()
    yield
    if not follows and shared:
        ranks.wait()


class Journal:
    """Losses by the fingerprint of the plan, in a file that survives a crash after every line; in memory without one.

    ``about`` names the search: the same words always lead to the same file. OutputError where it cannot be written.
    """

    def __init__(self, folder: Path | None, about: str) -> None:
        self.losses: dict[str, float] = {}
        self.path = folder and folder / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.jsonl"
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._resume(self.path, about)
        except OSError as error:
            raise OutputError(f"cannot write the journal {self.path}: {error.strerror}") from None

    def _resume(self, path: Path, about: str) -> None:
        """Read what is whole, cut off what is not (a crash may tear the last line), and begin the file if need be."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            found = _parsed(line)
            if found is None:
                break
            if "plan" in found:
                self.losses[str(found["plan"])] = float(found["loss"])
            whole += len(line)
        if whole:
            os.truncate(path, whole)
        else:
            path.unlink(missing_ok=True)
            self._write({"format": FORMAT, "version": VERSION, "search": about})

    def add(self, plan: str, loss: float) -> None:
        self.losses[plan] = loss
        if self.path is not None:
            try:
                self._write({"plan": plan, "loss": loss})
            except OSError as error:
                raise OutputError(f"cannot write the journal {self.path}: {error.strerror}") from None

    def _write(self, line: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Scored(Generic[G]):
    """One measured candidate."""

    genome: G
    loss: float


class Search(Generic[G]):
    """Measures candidates and never forgets one: the archive is the population.

    ``express`` makes the plan of a candidate, ``points`` turns its loss into a score of which more is better; ``total``
    measurements are to be made. A plan drawn again is not measured again.
    """

    def __init__(
        self,
        express: Callable[[G], Plan],
        evaluate: Evaluate,
        *,
        about: str,
        total: int,
        points: Callable[[float], float],
    ) -> None:
        spool = values.spool()
        self._express, self._evaluate, self._points = express, evaluate, points
        self._total, self._progress = total, _PROGRESS.get()
        self._journal = Journal(None if spool is None else spool.folder, about)
        self._trusted = not self._journal.losses or ranks.rank() > 0
        self._seen: set[str] = set()
        self.archive: list[Scored[G]] = []

    def try_new(self, draw: Callable[[], G]) -> Scored[G]:
        """Measure what ``draw`` gives; what was measured before is drawn again, within reason."""
        for _ in range(DRAWS):
            genome = draw()
            plan = self._express(genome)
            if plan.fingerprint not in self._seen:
                break
        self._seen.add(plan.fingerprint)
        self.archive.append(Scored(genome, self._loss(plan)))
        if self._progress is not None:
            self._progress(len(self.archive), self._total)
        return self.archive[-1]

    def ranked(self) -> list[Scored[G]]:
        """Best first; of equal ones the earlier."""
        return sorted(self.archive, key=lambda one: one.loss)

    def parents(self, points: float, least: int = 1) -> list[Scored[G]]:
        """Those within so many points of the best, and in any case the ``least`` best."""
        ranked = self.ranked()
        bar = self._points(ranked[0].loss) - points
        return [one for i, one in enumerate(ranked) if i < least or self._points(one.loss) >= bar]

    def _loss(self, plan: Plan) -> float:
        """From the journal where it is known. PlanError for a loss that is no number, or a journal of other text."""
        known = self._journal.losses.get(plan.fingerprint)
        if known is not None and self._trusted:
            return known
        loss = float(self._evaluate(plan))
        if math.isnan(loss) or loss == -math.inf:
            raise PlanError(
                f"measuring plan {len(self.archive) + 1} of the search gave {loss}, where a number is needed to "
                "compare plans: check the text it is measured on, and the source for weights that are not finite"
            )
        if known is None:
            self._journal.add(plan.fingerprint, loss)
            return loss
        if not math.isclose(loss, known, rel_tol=TOLERANCE):
            raise PlanError(
                f"the journal {self._journal.path} says a plan costs {known:.6g}, but here it costs {loss:.6g}: it is "
                "of other text; give the same text to go on, or delete the journal to begin again"
            )
        self._trusted = True
        return known
