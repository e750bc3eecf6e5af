"""`moekit apply`: carry out a plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli import _receipt, _show
from moekit.cli._options import (
    Device,
    Format,
    Json,
    Materialise,
    MaxRam,
    Model,
    OutputDir,
    Overwrite,
    ProfileFile,
    Text,
)
from moekit.cli._work import check_output, held_out


def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by `moekit plan`.")],
    output: OutputDir,
    text: Text = [],  # noqa: B006
    profile: ProfileFile = None,
    format: Format = "auto",
    materialise: Materialise = False,
    max_ram: MaxRam = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the model that a plan makes, layer by layer, with a receipt; resumes if it was interrupted.

    The result is measured on --text, or else on what the profile kept aside.

    \b
    Examples:
      moekit apply moekit:mini half.json --output out/half --profile mini.profile
      moekit apply ./model plan.json --output out/small --text held-out.txt --max-ram 3GB
    """
    check_output(output, overwrite)
    from moekit.checkpoint import Checkpoint
    from moekit.plan import Plan
    from moekit.plan import apply as carry_out
    from moekit.profile import Profile

    made = Plan.load(plan)
    checkpoint = Checkpoint.open(model)
    aside: Any = held_out(text, checkpoint)
    if aside is None and profile is not None:
        seen = Profile.load(profile)
        seen.check_source(checkpoint.fingerprint)
        aside = seen.held_out
    with _show.progress(f"apply {plan}") as advance:
        receipt = carry_out(
            checkpoint,
            made,
            output,
            text=aside or None,
            max_ram=max_ram,
            format=format,
            materialise=materialise,
            overwrite=overwrite,
            device=device,
            progress=advance,
        )
    if as_json:
        _show.emit(_receipt.as_dict(receipt, output))
    else:
        _receipt.show(receipt, output)
