"""`moekit verify`: prove again that an output is what its source and plan make."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli import _receipt, _show
from moekit.cli._groups import grouped
from moekit.cli._options import Against, Json, Machine, Text
from moekit.cli._work import held_out


@grouped
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output of apply, compress or fit.")],
    against: Against,
    *,
    text: Text = [],  # noqa: B006
    machine: Machine,
    as_json: Json = False,
) -> None:
    """Recompute every tensor of an output from its source and plan, and compare; trusts nothing that lies in DIR.

    Exit code 1 where they differ.

    \b
    Examples:
      moekit verify out/half --against moekit:mini
      moekit verify out/small --against ./model --text held-out.txt --json
    """
    from moekit.checkpoint import Checkpoint
    from moekit.plan.verify import verify as prove

    checkpoint = Checkpoint.open(against)
    with _show.parts(f"verify {directory}") as tell:
        report = prove(directory, checkpoint, text=held_out(text, checkpoint), **asdict(machine), progress=tell)
    if as_json:
        _show.emit({"ok": report.ok, **asdict(report)})
    else:
        _show.table((str(directory), "equal" if report.ok else "NOT what source and plan make"), list(_lines(report)))
        _receipt.domains(report.divergence)
    if not report.ok:
        raise typer.Exit(1)


def _lines(report: Any) -> Iterator[tuple[str, str]]:
    yield "format", str(report.format)
    yield "tensors", f"{report.tensors} recomputed from the source and the plan"
    yield "compared", _show.gigabytes(report.bytes_compared)
    for problem in report.problems:
        yield "problem", problem
    if report.divergence:
        yield from _receipt.divergence(report.divergence)
