"""`moekit export`: a model of our own as a stock checkpoint."""

from typing import Annotated

import typer

from moekit.cli import _show
from moekit.cli._options import Json, OutputDir, Overwrite
from moekit.cli._work import check_output


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that `moekit train` wrote.")],
    output: OutputDir,
    *,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model that moekit trained as a checkpoint of the stock family that computes the same.

    It then loads without moekit. Logits are compared first; where no family has a part, its name is told.

    \b
    Examples:
      moekit export out/plain --output out/plain-stock
    """
    check_output(output, overwrite)
    from moekit.checkpoint import Checkpoint
    from moekit.nn.stock import export as carry_out

    written = carry_out(model, output, overwrite=overwrite)
    family = Checkpoint.open(str(written)).model_type
    if as_json:
        _show.emit({"output": str(written), "family": family})
        return
    _show.table((str(written), ""), [("family", family)])
