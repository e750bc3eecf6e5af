"""`moekit plan`: decide what shall become of every expert, as a document."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._options import Device, Json, MaxRam, MaxTokens, Model, Overwrite, ProfileFile, Text, With
from moekit.cli._work import observed
from moekit.errors import OptionError, OutputError

if TYPE_CHECKING:
    from moekit.plan import Plan


def plan(
    model: Model,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The plan to write (JSON).")],
    methods: With = [],  # noqa: B006
    profile: ProfileFile = None,
    text: Text = [],  # noqa: B006
    max_tokens: MaxTokens = None,
    max_ram: MaxRam = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Let one or more methods decide what becomes of every expert, and write that down. Changes no model.

    \b
    Examples:
      moekit plan moekit:mini --with reap:keep=0.5 --profile mini.profile --output half.json
      moekit plan ./model --with easy-ep:keep=32 --with rtn:bits=8 --text notes.txt --output plan.json
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another name or give --overwrite")
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    made = decide(checkpoint, model, methods, profile, text, max_tokens=max_tokens, max_ram=max_ram, device=device)
    made.save(output, overwrite=overwrite)
    described = describe(made, checkpoint)
    if as_json:
        _show.emit({"model": model, "output": output, **described})
    else:
        show(described)
        _show.say("", f"wrote {output}; apply it with: moekit apply {model} {output} --output DIR")


def decide(
    checkpoint: Any, name: str, methods: list[str], profile: Path | None, text: list[str], **options: Any
) -> "Plan":
    """The plan of methods in sequence; a profile is read or made only where one of them needs it."""
    if not methods:
        raise OptionError("no method given: name one with --with, such as --with reap:keep=0.5")
    from moekit.compress import sequence
    from moekit.plan import make_plan

    planners = sequence(methods)
    needed = any(planner.needs for planner in planners) or profile is not None or text
    seen = observed(checkpoint, name, profile, text, **options) if needed else None
    return make_plan(planners, checkpoint, seen)


def describe(made: "Plan", checkpoint: Any) -> dict[str, Any]:
    """The plan in figures: bytes before and after, and one record per layer."""
    layers = []
    for name, layer in made.layers.items():
        bits = sorted({expert.bits for expert in layer.experts})
        merged = sum(len(expert.parts) > 1 for expert in layer.experts)
        layers.append(
            {
                "layer": name,
                "experts": layer.num_experts,
                "stored": len(layer.experts),
                "merged": merged,
                "bits": bits,
                "why": layer.why,
            }
        )
    before = sum(info.nbytes for info in checkpoint.tensors.values())
    return {"methods": made.methods, "bytes": before, "bytes_planned": made.nbytes(checkpoint), "layers": layers}


def show(described: dict[str, Any]) -> None:
    """The plan as a table, and what it does to the size."""
    rows = [
        (
            layer["layer"],
            f"{layer['experts']}",
            f"{layer['stored']}",
            f"{layer['merged']}",
            " ".join(map(str, layer["bits"])),
            layer["why"],
        )
        for layer in described["layers"]
    ]
    _show.table(("layer", "experts", "stored", "merged", "bits", "why"), rows)
    before, after = described["bytes"], described["bytes_planned"]
    _show.say("", f"size: {_show.gigabytes(before)} -> {_show.gigabytes(after)} ({after / before:.0%})")
