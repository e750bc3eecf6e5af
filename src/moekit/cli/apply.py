"""`moekit apply`: carry out a plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli import _receipt
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, Model, OutputDir, ProfileFile, Text, Written
from moekit.cli._work import carried_out, check_output, held_out


@grouped
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by `moekit plan`.")],
    output: OutputDir,
    *,
    text: Text = [],  # noqa: B006
    profile: ProfileFile = None,
    written: Written,
    machine: Machine,
    as_json: Json = False,
) -> None:
    """Write the model that a plan makes, layer by layer, with a receipt; resumes if it was interrupted.

    The result is measured on --text, or else on what the profile kept aside.

    \b
    Examples:
      moekit apply moekit:mini half.json --output out/half --profile mini.profile
      moekit apply ./model plan.json --output out/small --text held-out.txt --max-ram 3GB
    """
    check_output(output, written.overwrite)
    from moekit.checkpoint import Checkpoint
    from moekit.plan import Plan
    from moekit.profile import Profile

    made = Plan.load(plan)
    checkpoint = Checkpoint.open(model)
    aside: Any = held_out(text, checkpoint)
    if aside is None and profile is not None:
        seen = Profile.load(profile)
        seen.check_source(checkpoint.fingerprint)
        aside = seen.held_out
    receipt = carried_out(checkpoint, made, output, aside, written, machine, f"apply {plan}")
    _receipt.tell(receipt, output, as_json)
