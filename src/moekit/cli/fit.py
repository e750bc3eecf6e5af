"""`moekit fit`: a solver chooses what to keep, and at what precision, to lose least within a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _curve, _receipt, _show
from moekit.cli._options import (
    Device,
    Format,
    HeldOut,
    Json,
    Materialise,
    MaxRam,
    MaxTokens,
    Model,
    Overwrite,
    ProfileFile,
    Text,
)
from moekit.cli._work import check_output, held_out, observed
from moekit.errors import OptionError

if TYPE_CHECKING:
    from moekit.plan import FitResult, Receipt


def fit(
    model: Model,
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
    ratio: Annotated[float | None, typer.Option("--ratio", metavar="R", help="Share of the bytes to remove.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write; must not exist yet.")
    ] = None,
    profile: ProfileFile = None,
    text: Text = [],  # noqa: B006
    aside: HeldOut = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would do, write no model.")] = False,
    curve: Annotated[
        Path | None, typer.Option("--curve", metavar="FILE", help="Write size against loss to FILE.html or FILE.png.")
    ] = None,
    format: Format = "auto",
    materialise: Materialise = False,
    max_tokens: MaxTokens = None,
    max_ram: MaxRam = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit a model into a size, losing least: shows the plan, then applies it, checks it and measures what it cost.

    \b
    Examples:
      moekit fit moekit:mini --ratio 0.5 --text notes.txt --output out/half
      moekit fit ./model --memory 8GB --context 8192 --profile m.profile --output out/fits --max-ram 4GB
      moekit fit owner/model --size 6GB --profile m.profile --dry-run
    """
    if output is None and not dry_run:
        raise OptionError("nowhere to write: give --output DIR, or --dry-run to only look")
    if output is not None:
        check_output(output, overwrite)
    if curve is not None:
        _curve.check(curve)
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open_headers(model) if dry_run else Checkpoint.open(model)
    checked = held_out(aside, checkpoint) if aside else None
    seen = observed(checkpoint, model, profile, text, max_tokens=max_tokens, max_ram=max_ram, device=device)
    budget = {"size": size, "memory": memory, "context": context, "ratio": ratio}
    result, judge = search(checkpoint, seen, budget, format=format, device=device, max_ram=max_ram)
    if curve is not None:
        _curve.write(result.curve, result.nbytes, curve, f"{model}: size against predicted loss")
    if not as_json:
        _show.say(result.describe(), "")
        _curve.show(result.curve, result.nbytes)
        _show.say("")
    receipt = None
    if output is not None and not dry_run:
        receipt = _carry_out(
            checkpoint,
            result,
            output,
            text=checked or judge or None,
            format=format,
            materialise=materialise,
            overwrite=overwrite,
            max_ram=max_ram,
            device=device,
        )
    _report(result, receipt, output, as_json)


def _carry_out(checkpoint: Any, result: "FitResult", output: Path, **options: Any) -> "Receipt":
    """Apply the plan, then compute every tensor again and compare; VerificationError where they differ."""
    from moekit.plan import apply
    from moekit.plan.verify import verify

    with _show.progress(f"apply to {checkpoint.path.name}") as advance:
        receipt = apply(checkpoint, result.plan, output, progress=advance, **options)
    with _show.progress(f"verify {output}") as advance:
        verify(output, checkpoint, max_ram=options["max_ram"], device=options["device"], progress=advance).require()
    return receipt


def search(
    checkpoint: Any,
    seen: Any,
    budget: dict[str, Any],
    *,
    format: str = "auto",
    device: str = "auto",
    max_ram: str | None = None,
) -> tuple["FitResult", Any]:
    """The solver's result, and the tokens kept aside that had no part in it.

    Plans are compared by running them where the model is at hand and fits in memory; else the prediction decides.
    """
    from moekit.plan import fit as solve
    from moekit.plan import live_loss, split_held_out

    choose, judge = split_held_out(seen.held_out)
    remote = checkpoint.is_remote
    evaluate = None if remote else live_loss(checkpoint, choose, device=device, max_ram=max_ram)
    with _show.progress("fit") as advance:
        result = solve(
            checkpoint,
            seen,
            evaluate=evaluate,
            weights=not remote,
            format=format,
            progress=lambda what, done, total: advance(done, total),
            **budget,
        )
    return result, judge


def _report(result: "FitResult", receipt: "Receipt | None", output: Path | None, as_json: bool) -> None:
    measured = receipt.divergence["kl"] if receipt and receipt.divergence else None
    if as_json:
        _show.emit(
            {
                "budget": {"bytes": result.budget.nbytes, "asked": result.budget.asked},
                "bytes": result.nbytes,
                "bytes_source": result.source_nbytes,
                "predicted": result.predicted,
                "measured_on_calibration": result.measured,
                "measured": measured,
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
