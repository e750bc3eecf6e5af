"""What a person or a program sees: tables and JSON on standard output, progress on standard error."""

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Advance = Callable[..., None]
"""Called with (steps done, steps in all) while something runs, and the name of the part where it has several."""

_PATIENCE = 2.0
"""Seconds before a progress bar appears."""
_PIPED_WIDTH = 160


def out() -> Console:
    """Standard output; wide and without colours where it is piped."""
    piped = not sys.stdout.isatty()
    return Console(file=sys.stdout, width=_PIPED_WIDTH if piped else None, soft_wrap=piped, highlight=False)


def say(*lines: str) -> None:
    """Lines on standard output, as they are."""
    console = out()
    for line in lines:
        console.print(line, markup=False)


@contextmanager
def silenced(on: bool) -> Iterator[None]:
    """While it lasts nothing reaches standard output, if `on`: what follows is one JSON document."""
    with redirect_stdout(io.StringIO()) if on else nullcontext():
        yield


def emit(data: Any) -> None:
    """One JSON document on standard output; NaN and infinities become null."""
    sys.stdout.write(json.dumps(_plain(data), indent=2) + "\n")


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if hasattr(data, "tolist"):
        return _plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data if isinstance(data, str | int | float | bool | None) else str(data)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on standard output; every column but the first is right-aligned where all its cells are numbers."""
    cells = [[_cell(value) for value in row] for row in rows]
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        numeric = i > 0 and all(_is_number(row[i]) for row in cells)
        shown.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for row in cells:
        shown.add_row(*map(Text, row))
    out().print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] in "-+." and cell[1:2].isdigit())


def interval(figures: Mapping[str, Any], name: str, form: str) -> str:
    """A mean and its interval `[low, high]`, as a receipt holds them."""
    mean, low, high = (format(figures[name + end], form) for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def gigabytes(size: float) -> str:
    """Bytes as GB of 10^9 with one decimal; as MB where that would read 0.0."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def parameters(count: float) -> str:
    """A number of parameters as people say it: 7.2B, 3.4M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(int(count))


@contextmanager
def progress(label: str) -> Iterator[Advance]:
    """A bar with an estimate of the time left, on standard error, once the work has taken two seconds. Each part of
    the work has its own estimate."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    begun = time.monotonic()
    task = bar.add_task(label, total=None)
    current = ""

    def advance(done: float, total: int, what: str = "") -> None:
        nonlocal current
        if what != current:
            current = what
            bar.reset(task, description=f"{label}: {what}")
        bar.update(task, completed=done, total=total)
        if time.monotonic() - begun > _PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()


class Parts:
    """Progress told as (what, steps done, steps in all), and of what goes on inside the present step."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._now = ("", 0, 1)

    def __call__(self, what: str, done: int, total: int) -> None:
        self._now = (what, done, total)
        self._advance(done, total, what)

    def inside(self, done: int, total: int) -> None:
        what, steps, of = self._now
        self._advance(steps + done / max(total, 1), of, what)


@contextmanager
def parts(label: str) -> Iterator[Parts]:
    """:func:`progress` of work that says which part of it is going on."""
    with progress(label) as advance:
        yield Parts(advance)


class Watched:
    """A runner whose passes show a progress bar; it is one itself. Layers, or batches in memory, move the bar.

    Two that run side by side share one bar: ``beside`` gives the second.
    """

    def __init__(self, runner: Any, label: str, bar: "_Shared | None" = None) -> None:
        self.runner, self.model, self.label = runner, runner.model, label
        self._bar = bar or _Shared(label)

    def beside(self, runner: Any) -> "Watched":
        return Watched(runner, self.label, self._bar)

    def forward(self, batches: Sequence[Any]) -> Iterator[Any]:
        """As the runner's own."""
        with self._bar.open() as advance:
            yield from self.runner.forward(batches, on_layer=advance)


class _Shared:
    """One bar for all who have it open: the steps of each add up."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._stack = ExitStack()
        self._steps: dict[int, tuple[int, int]] = {}
        self._users = 0

    @contextmanager
    def open(self) -> Iterator[Advance]:
        if not self._users:
            self._advance = self._stack.enter_context(progress(self._label))
            self._steps.clear()
        self._users += 1
        me = len(self._steps)
        self._steps[me] = (0, 0)

        def advance(done: int, total: int) -> None:
            self._steps[me] = (done, total)
            dones, totals = zip(*self._steps.values(), strict=True)
            self._advance(sum(dones), sum(totals))

        try:
            yield advance
        finally:
            self._users -= 1
            if not self._users:
                self._stack.close()
