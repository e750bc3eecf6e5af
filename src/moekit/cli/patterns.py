"""`moekit patterns`: which experts each task needs, in a few bytes per task."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, Model, Observed, Overwrite
from moekit.cli._work import check_output, observed

if TYPE_CHECKING:
    from moekit.compress.premoe import Patterns


@grouped
def patterns(
    model: Model,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The patterns to write.")],
    *,
    seen: Observed,
    machine: Machine,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Store one pattern of needed experts per task (domain of the text), for `retrieve` to choose from (PreMoe).

    \b
    Examples:
      moekit patterns moekit:mini --text sums=sums.txt --text code=code.txt --output tasks.patterns
      moekit patterns ./model --profile all.profile --output tasks.patterns
    """
    check_output(output, overwrite)
    from moekit.checkpoint import Checkpoint
    from moekit.compress.premoe import Patterns, PreMoe

    checkpoint = Checkpoint.open(model)
    profile = observed(checkpoint, model, seen, machine, PreMoe.needs)
    profile.require(sorted(PreMoe.needs))
    found = Patterns.of(profile, checkpoint)
    found.save(output, overwrite=overwrite)
    tasks = _tasks(found)
    if as_json:
        size = output.stat().st_size
        _show.emit({"model": model, "output": output, "layers": len(found.layers), "bytes": size, "tasks": tasks})
        return
    rows = [(task["task"], task["nearest"], task["distance"]) for task in tasks]
    _show.table(("task", "nearest other", "distance"), rows)
    _show.say("", f"wrote {output}; choose from it with: moekit retrieve {model} {output} --prompt TEXT")


def _tasks(found: "Patterns") -> list[dict[str, Any]]:
    """Each task with the one it is nearest to: those close together are easily taken for one another."""
    made = []
    for task in found.tasks:
        other = found.without(task)
        match = other.retrieve(found.keys[task]) if other.tasks else None
        made.append({"task": task, "nearest": match and match.task, "distance": match and match.distance})
    return made
