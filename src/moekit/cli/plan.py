"""`moekit plan`: decide what shall become of every expert, as a document."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, Model, Observed, Overwrite, Task, With
from moekit.cli._work import leads, planned
from moekit.errors import OutputError

if TYPE_CHECKING:
    from moekit.plan import Plan


@grouped
def plan(
    model: Model,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The plan to write (JSON).")],
    *,
    methods: With = [],  # noqa: B006
    seen: Observed,
    task: Task = None,
    machine: Machine,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Let one or more methods decide what becomes of every expert, and write that down. Changes no model.

    \b
    Examples:
      moekit plan moekit:mini --with reap:keep=0.5 --profile mini.profile --output half.json
      moekit plan ./model --with easy-ep:keep=32 --with rtn:bits=8 --text notes.txt --output plan.json
      moekit plan ./model --with rtn:bits=4 --with 'rtn@model.layers.[0-3].*:bits=8' --output plan.json
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another name or give --overwrite")
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    from moekit.plan import values

    with values.spooling(values.folder_of(output)) as spool:
        made = planned(checkpoint, model, methods, seen, machine, task).plan
    if not leads():
        return
    made.save(output, overwrite=overwrite)
    spool.tidy(made.digests)
    described = describe(made, checkpoint)
    if as_json:
        _show.emit({"model": model, "output": output, **described})
    else:
        show(described)
        _show.say("", f"wrote {output}; apply it with: moekit apply {model} {output} --output DIR")


def describe(made: "Plan", checkpoint: Any) -> dict[str, Any]:
    """The plan in figures: bytes before and after, and one record per layer."""
    layers = []
    for name, layer in made.layers.items():
        bits = sorted({bits for bits, _ in layer.widths})
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
