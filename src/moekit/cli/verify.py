"""`moekit verify`: prove again that an output is what its source and plan make."""

from pathlib import Path
from typing import Annotated

import typer

from moekit.cli import _receipt, _show
from moekit.cli._options import Device, Json, MaxRam, Text
from moekit.cli._work import held_out


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output of apply, compress or fit.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The model it was made from.")],
    text: Text = [],  # noqa: B006
    max_ram: MaxRam = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Recompute every tensor of an output from its source and plan, and compare; trusts nothing that lies in DIR.

    \b
    Examples:
      moekit verify out/half --against moekit:mini
      moekit verify out/small --against ./model --text held-out.txt --json
    """
    from moekit.checkpoint import Checkpoint
    from moekit.plan import verify as prove

    checkpoint = Checkpoint.open(against)
    with _show.progress(f"verify {directory}") as advance:
        report = prove(
            directory, checkpoint, text=held_out(text, checkpoint), max_ram=max_ram, device=device, progress=advance
        )
    if as_json:
        _show.emit({"directory": directory, **report.as_dict()})
        return
    _show.table(
        (str(directory), ""),
        [
            ("verified", f"{report.tensors} tensors equal what {against} and the plan give"),
            *_receipt.divergence(report.divergence),
        ],
    )
