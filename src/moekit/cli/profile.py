"""`moekit profile`: watch a model route text."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, MaxTokens, Model, Overwrite, Text
from moekit.errors import OptionError, OutputError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Watched:
    """How much is observed, and what of it is kept."""

    statistics: Annotated[
        str | None,
        typer.Option("--statistics", metavar="A,B,C", help="Only these statistics; `all` for everything there is."),
    ] = None
    decode_tokens: Annotated[
        int, typer.Option("--decode-tokens", metavar="N", min=0, help="Also generate N tokens after each sequence.")
    ] = 0
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=0, help="Tokens per layer whose hidden states are kept.")
    ] = 64
    balanced: Annotated[
        float,
        typer.Option("--balanced", metavar="R", min=0.0, help="Keep R times an even share of tokens for every expert."),
    ] = 0.0
    max_tokens: MaxTokens = None
    seed: Annotated[int, typer.Option("--seed", help="Which sequences are used and kept aside.")] = 0


@grouped
def profile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The profile to write.")],
    *,
    text: Text = [],  # noqa: B006
    self_sample: Annotated[
        str | None,
        typer.Option("--self-sample", metavar="NxLENGTH", help="Route what the model writes itself, such as 32x128."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Also write a page of heat maps."),
    ] = None,
    watched: Watched,
    machine: Machine,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Route text through a model and keep what every expert did: one file that all other commands read.

    \b
    Examples:
      moekit profile moekit:mini --text notes.txt --output mini.profile --report mini.html
      moekit profile ./model --text code=a.jsonl --text math=b.jsonl --output p.profile --max-ram 4GB
      moekit profile ./model --self-sample 128x512 --sample 4096 --balanced 2 --output p.profile
    """
    if bool(text) == (self_sample is not None):
        given = "both are" if text else "neither is"
        raise OptionError(f"nothing to route: give either --text FILE or --self-sample NxLENGTH ({given} given)")
    for path in (output, report):
        if path is not None and path.exists() and not overwrite:
            raise OutputError(f"{path} exists: choose another name or give --overwrite")
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"{path.parent} is no folder: create it, or choose another place for {path.name}")
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    texts = _texts(checkpoint, text, self_sample, watched.seed, machine, quiet=as_json)
    found = _observed(checkpoint, texts, watched, machine, f"profile {model}")
    found.save(output, overwrite=overwrite)
    if report is not None:
        found.report(report, overwrite=overwrite)
    _tell(found, {"model": model, "output": output, "report": report}, as_json)


def _texts(
    checkpoint: "Checkpoint", text: list[str], size: str | None, seed: int, machine: Machine, *, quiet: bool
) -> dict[str, Any]:
    """What is routed: documents by domain, or what the model writes itself."""
    from moekit.profile import read_texts, self_sampled_texts

    if size is None:
        return read_texts(text, checkpoint.tokenizer())
    with _show.progress(f"{checkpoint.path.name} writes") as advance:
        texts, told = self_sampled_texts(checkpoint, size, seed=seed, progress=advance, **asdict(machine))
    if told.degenerate and not quiet:
        own, plain = told.distinct[1], told.plain_distinct[1]
        shares = f"{own:.2f} of its pairs of tokens are different ones, of plainly drawn text {plain:.2f}"
        _show.say(f"what the model wrote repeats itself: {shares}")
    return dict(texts)


def _observed(
    checkpoint: "Checkpoint", texts: dict[str, Any], watched: Watched, machine: Machine, label: str
) -> "Profile":
    from moekit.profile import FIELDS
    from moekit.profile import profile as observe

    options = asdict(watched)
    named = options.pop("statistics")
    options["statistics"] = list(FIELDS) if named == "all" else named.split(",") if named else None
    with _show.progress(label) as advance:
        return observe(checkpoint, texts, progress=advance, **options, **asdict(machine))


def _tell(found: "Profile", names: dict[str, Any], as_json: bool) -> None:
    if as_json:
        figures = {
            "tokens": found.num_tokens,
            "domains": found.domains,
            "statistics": found.statistics,
            "fingerprint": found.fingerprint,
            "starved": found.starved(),
        }
        _show.emit({**names, **figures})
        return
    for part in found.tables():
        _show.table(part.columns, part.rows, part.title)
        _show.say(part.note, "")
    _show.say(f"wrote {names['output']}" + (f" and {names['report']}" if names["report"] else ""))
