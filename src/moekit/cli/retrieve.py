"""`moekit retrieve`: the stored pattern that fits a prompt, and a plan that keeps its experts."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, Model, Overwrite
from moekit.cli._work import check_output
from moekit.errors import OptionError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.compress.premoe import Match, Patterns


@grouped
def retrieve(
    model: Model,
    stored: Annotated[Path, typer.Argument(metavar="PATTERNS", help="What `moekit patterns` wrote.")],
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="A query: its task is the nearest stored one.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="NAME", help="A stored task, without a query.")] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="M", help="Experts per layer that the plan keeps: a share or a number.")
    ] = "0.5",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PLAN", help="Write a plan that keeps the task's experts only.")
    ] = None,
    machine: Machine,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find a prompt's task by how the first MoE layer routes it, and plan to keep that task's experts.

    Nothing after the first MoE layer is read; `moekit apply` then reads the experts that stay, and no others.

    \b
    Examples:
      moekit retrieve moekit:mini tasks.patterns --prompt "sort: d a c b ->"
      moekit retrieve ./model tasks.patterns --prompt "What is 12 * 7?" --keep 0.5 --output math.json
      moekit retrieve ./model tasks.patterns --task math --keep 32 --output math.json
    """
    if (prompt is None) == (task is None):
        raise OptionError(
            f"give either --prompt TEXT or --task NAME ({'neither is' if task is None else 'both are'} given)"
        )
    if output is not None:
        check_output(output, overwrite)
    from moekit.checkpoint import Checkpoint
    from moekit.compress.premoe import Patterns

    patterns, checkpoint = Patterns.load(stored), Checkpoint.open(model)
    patterns.check_source(checkpoint.fingerprint)
    match = None if prompt is None else _match(patterns, checkpoint, prompt, machine)
    chosen = match.task if match is not None else str(task)
    plan = patterns.plan(chosen, _number(keep), checkpoint)
    if output is not None:
        plan.save(output, overwrite=overwrite)
    found: dict[str, Any] = {"model": model, "task": chosen, "output": output}
    found |= {"distance": match.distance, "margin": match.margin} if match is not None else {}
    if as_json:
        before = sum(info.nbytes for info in checkpoint.tensors.values())
        _show.emit({**found, "bytes": before, "bytes_planned": plan.nbytes(checkpoint)})
        return
    _show.say(
        f"task: {chosen}"
        + (f" (distance {match.distance:.3g}, the next is {match.margin:.3g} further)" if match else "")
    )
    if output is not None:
        _show.say(f"wrote {output}; apply it with: moekit apply {model} {output} --output DIR")


def _match(patterns: "Patterns", checkpoint: "Checkpoint", prompt: str, machine: Machine) -> "Match":
    """The nearest pattern; layers are streamed, of which the first MoE layer is the last that is needed."""
    import numpy as np

    from moekit.compress.premoe import marker
    from moekit.stream import StreamedModel, pick_device

    options = asdict(machine) | {"device": pick_device(machine.device)}
    ids = np.array(checkpoint.tokenizer()(prompt)["input_ids"], dtype=np.int64)
    return patterns.retrieve(marker(StreamedModel(checkpoint, **options), [ids]))


def _number(keep: str) -> float | int:
    try:
        return float(keep) if "." in keep else int(keep)
    except ValueError:
        raise OptionError(f"--keep {keep} is no share, such as 0.5, and no number of experts, such as 32") from None
