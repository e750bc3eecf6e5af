"""`moekit profile`: watch a model route text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, MaxTokens, Model, Overwrite, Text
from moekit.errors import OptionError, OutputError


@grouped
def profile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The profile to write.")],
    *,
    text: Text = [],  # noqa: B006
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Also write a page of heat maps."),
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option("--statistics", metavar="A,B,C", help="Only these statistics; `all` for everything there is."),
    ] = None,
    decode_tokens: Annotated[
        int, typer.Option("--decode-tokens", metavar="N", min=0, help="Also generate N tokens after each sequence.")
    ] = 0,
    max_tokens: MaxTokens = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=0, help="Tokens per layer whose hidden states are kept.")
    ] = 64,
    balanced: Annotated[
        float,
        typer.Option("--balanced", metavar="R", min=0.0, help="Keep R times an even share of tokens for every expert."),
    ] = 0.0,
    self_sample: Annotated[
        str | None,
        typer.Option("--self-sample", metavar="NxLENGTH", help="Route what the model writes itself, such as 32x128."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which sequences are used and kept aside.")] = 0,
    machine: Machine,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Route text through a model and keep what every expert did: one file that all other commands read.

    \b
    Examples:
      moekit profile moekit:mini --text notes.txt --output mini.profile --report mini.html
      moekit profile ./model --text code=a.jsonl --text math=b.jsonl --output p.profile --max-ram 4GB
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
    from moekit.profile import FIELDS, read_texts, self_sampled_texts
    from moekit.profile import profile as observe

    names = list(FIELDS) if statistics == "all" else statistics.split(",") if statistics else None
    checkpoint = Checkpoint.open(model)
    texts: Any
    if self_sample is None:
        texts = read_texts(text, checkpoint.tokenizer())
    else:
        with _show.progress(f"{model} writes") as advance:
            texts, told = self_sampled_texts(checkpoint, self_sample, seed=seed, progress=advance, **asdict(machine))
        if told.degenerate and not as_json:
            _show.say(f"what the model wrote repeats itself: {told}")
    with _show.progress(f"profile {model}") as advance:
        found = observe(
            checkpoint,
            texts,
            max_tokens=max_tokens,
            statistics=names,
            decode_tokens=decode_tokens,
            sample=sample,
            balanced=balanced,
            seed=seed,
            progress=advance,
            **asdict(machine),
        )
    found.save(output, overwrite=overwrite)
    if report is not None:
        found.report(report, overwrite=overwrite)
    if as_json:
        _show.emit(
            {
                "model": model,
                "output": output,
                "report": report,
                "tokens": found.num_tokens,
                "domains": found.domains,
                "statistics": found.statistics,
                "fingerprint": found.fingerprint,
                "starved": found.starved(),
            }
        )
        return
    for part in found.tables():
        _show.table(part.columns, part.rows, part.title)
        _show.say(part.note, "")
    _show.say(f"wrote {output}" + (f" and {report}" if report else ""))
