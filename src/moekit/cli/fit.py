"""`moekit fit`: a solver chooses what to keep, and at what precision, to lose least within a budget."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _curve, _receipt, _show
from moekit.cli._groups import grouped
from moekit.cli._options import HeldOut, Json, Machine, Model, Observed, Written
from moekit.cli._work import beside, carried_out, check_output, held_out, observed
from moekit.errors import OptionError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.plan import FitResult, Plan, Receipt
    from moekit.profile import Profile
    from moekit.run.weigh import Weighed


@grouped
def fit(
    model: Model,
    *,
    size: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help="Size of the weights, such as 6GB.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Weights and cache together, such as 8GB.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="N", help="Tokens of cache that --memory counts.  [default: 4096]"),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            "--speed",
            metavar="X",
            help="With --memory: weights may be larger than that as long as paging them allows X tokens/s.",
        ),
    ] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", metavar="R", help="Share of the bytes to remove.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write; must not exist yet.")
    ] = None,
    seen: Observed,
    aside: HeldOut = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would do, write no model.")] = False,
    curve: Annotated[
        Path | None, typer.Option("--curve", metavar="FILE", help="Write size against loss to FILE.html or FILE.png.")
    ] = None,
    written: Written,
    machine: Machine,
    as_json: Json = False,
) -> None:
    """Fit a model into a size, losing least: shows the plan, then applies it, checks it and measures what it cost.

    \b
    Examples:
      moekit fit moekit:mini --ratio 0.5 --text notes.txt --output out/half
      moekit fit ./model --memory 8GB --context 8192 --profile m.profile --output out/fits --max-ram 4GB
      moekit fit ./model --memory 8GB --speed 5 --text notes.txt --output out/paged
      moekit fit owner/model --size 6GB --profile m.profile --dry-run
    """
    if output is None and not dry_run:
        raise OptionError("nowhere to write: give --output DIR, or --dry-run to only look")
    if output is not None:
        check_output(output, written.overwrite)
    if curve is not None:
        _curve.check(curve)
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open_headers(model) if dry_run else Checkpoint.open(model)
    checked = held_out(aside, checkpoint) if aside else None
    from moekit.plan.room import fitting_bytes

    profile = observed(checkpoint, model, seen, machine, {"hidden"}, partial(fitting_bytes, checkpoint))
    budget = {"size": size, "memory": memory, "context": context, "ratio": ratio}
    weighed = None if speed is None else paged(checkpoint, profile, memory, context, speed)
    if weighed is not None:
        budget = {"size": weighed.nbytes}
        if not as_json:
            _show.say(str(weighed))
    from moekit.plan import values

    with values.spooling(beside(output)) if output else nullcontext() as spool:
        result, judge = search(checkpoint, profile, budget, machine, format=written.format)
    if curve is not None:
        _curve.write(result.curve, result.nbytes, curve, f"{model}: size against predicted loss")
    if not as_json:
        _show.say(result.describe(), "")
        _curve.show(result.curve, result.nbytes)
        _show.say("")
    receipt = None
    if output is not None and not dry_run:
        receipt = carried_out(checkpoint, result.plan, output, checked or judge, written, machine, f"apply to {model}")
        prove(output, checkpoint, machine, result.plan)
    if spool is not None:
        spool.tidy()
    _report(result, receipt, output, weighed, as_json)


def paged(
    checkpoint: "Checkpoint", profile: "Profile", memory: str | None, context: int | None, speed: float
) -> "Weighed":
    """How large the weights may be if experts are paged from disk at this speed or a higher one."""
    if memory is None:
        raise OptionError("--speed says how fast paging must be: give --memory with it")
    if checkpoint.is_remote:
        raise OptionError("--speed measures the disk that the model lies on: download the model first")
    from moekit.plan.budget import budget_of
    from moekit.run.weigh import read_rate, weigh

    room = budget_of(checkpoint, memory=memory, context=context).nbytes
    return weigh(checkpoint, profile, room, speed, read_rate(checkpoint))


def prove(output: Path, checkpoint: "Checkpoint", machine: Machine, plan: "Plan | None" = None) -> int:
    """Compute every tensor of an output again and compare; how many. VerificationError where they differ."""
    from moekit.plan.verify import verify

    with _show.parts(f"verify {output}") as tell:
        report = verify(output, checkpoint, plan=plan, progress=tell, **asdict(machine))
    report.require()
    return report.tensors


def search(
    checkpoint: "Checkpoint",
    profile: "Profile",
    budget: dict[str, Any],
    machine: Machine,
    *,
    format: str = "auto",
) -> tuple["FitResult", Any]:
    """The solver's result, and the tokens kept aside that had no part in it.

    Plans are compared by running them where the model is at hand; else the prediction decides.
    """
    from moekit.compress import finishes
    from moekit.plan import fit as solve
    from moekit.plan import live_loss, split_held_out

    choose, judge = split_held_out(profile.held_out)
    remote = checkpoint.is_remote
    with _show.parts("fit") as tell:
        tell("running the source", 0, 1)
        evaluate = None if remote else live_loss(checkpoint, choose, progress=tell.inside, **asdict(machine))
        # Calibrated points lie in moekit's own format only.
        own = format in ("auto", "moekit") and not remote
        finish = finishes(checkpoint, profile) if own else None
        result = solve(
            checkpoint,
            profile,
            evaluate=evaluate,
            weights=not remote,
            format=format,
            finish=finish,
            progress=tell,
            **budget,
        )
    return result, judge


def _report(
    result: "FitResult", receipt: "Receipt | None", output: Path | None, weighed: "Weighed | None", as_json: bool
) -> None:
    measured = receipt.divergence["kl"] if receipt and receipt.divergence else None
    if as_json:
        _show.emit(
            {
                "budget": {"bytes": result.budget.nbytes, "asked": result.budget.asked},
                "paging": weighed.as_dict() if weighed else None,
                "bytes": result.nbytes,
                "bytes_source": result.source_nbytes,
                "predicted": result.predicted,
                "measured_on_calibration": result.measured,
                "measured": measured,
                "measured_over_predicted": result.spread,
                "levers": result.levers,
                "candidates": [
                    {"name": one.name, "predicted": one.predicted, "measured": one.measured}
                    for one in result.candidates
                ],
                "curve": result.curve,
                "receipt": _receipt.as_dict(receipt, output) if receipt and output else None,
            }
        )
    elif receipt is not None and output is not None:
        _receipt.show(receipt, output)
        _show.say("verified: every tensor is what the source and the plan give")
        if measured is not None:
            _show.say(
                f"loss: predicted {result.predicted:.3g}, measured {measured:.3g} nats per token on held-out text"
            )
