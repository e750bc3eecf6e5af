"""`moekit compress`: profile, plan by named methods, apply."""

from moekit.cli import _receipt, _show
from moekit.cli._options import (
    Device,
    Format,
    HeldOut,
    Json,
    Materialise,
    MaxRam,
    MaxTokens,
    Model,
    OutputDir,
    Overwrite,
    ProfileFile,
    Text,
    With,
)
from moekit.cli._work import check_output, held_out, observed
from moekit.errors import OptionError


def compress(
    model: Model,
    output: OutputDir,
    methods: With = [],  # noqa: B006
    profile: ProfileFile = None,
    text: Text = [],  # noqa: B006
    aside: HeldOut = [],  # noqa: B006
    format: Format = "auto",
    materialise: Materialise = False,
    max_tokens: MaxTokens = None,
    max_ram: MaxRam = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Profile a model, let named methods plan, and apply the plan: `fit` lets a solver choose instead.

    \b
    Examples:
      moekit compress moekit:mini --with easy-ep:keep=0.5 --with rtn:bits=8 --text notes.txt --output out/small
      moekit compress ./model --with reap:keep=0.75 --profile m.profile --output out/m75 --max-ram 4GB
    """
    if not methods:
        raise OptionError("no method given: name one with --with, such as --with reap:keep=0.5")
    check_output(output, overwrite)
    from moekit.checkpoint import Checkpoint
    from moekit.compress import sequence
    from moekit.plan import apply, make_plan

    planners = sequence(methods)
    checkpoint = Checkpoint.open(model)
    checked = held_out(aside, checkpoint)
    needed = profile is not None or text or any(planner.needs for planner in planners)
    seen = (
        observed(checkpoint, model, profile, text, max_tokens=max_tokens, max_ram=max_ram, device=device)
        if needed
        else None
    )
    made = make_plan(planners, checkpoint, seen)
    with _show.progress(f"compress {model}") as advance:
        receipt = apply(
            checkpoint,
            made,
            output,
            text=checked or (seen.held_out if seen else None) or None,
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
