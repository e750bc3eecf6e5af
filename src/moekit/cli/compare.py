"""`moekit compare`: any set of methods at equal bytes, in one table and one plot."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _pareto, _show
from moekit.cli._options import Json, MaxTokens, Model, Overwrite, Text
from moekit.cli._work import check_output
from moekit.errors import OptionError

if TYPE_CHECKING:
    from moekit.compress import Comparison


def compare(
    model: Model,
    methods: Annotated[
        list[str],
        typer.Option(
            "--with",
            metavar="METHOD[:KEY=VALUE,...][/METHOD...]",
            help="A contestant: a method, several one after the other (reap/rtn:bits=4), or fit. Repeatable.",
        ),
    ] = [],  # noqa: B006
    ratio: Annotated[
        str, typer.Option("--ratio", metavar="R,...", help="Shares of the bytes to remove.")
    ] = "0.25,0.5,0.75",
    text: Text = [],  # noqa: B006
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Cut the text anew N times.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Write compare.json, .html and .png there.")
    ] = None,
    max_tokens: MaxTokens = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare methods at equal bytes: each is turned down until it fits, and measured on text it never saw.

    The part of a method that sets its size (keep, bits, rank) is chosen for it unless it is given. Random pruning,
    pruning by frequency, averaging of random groups and rounding with and without calibration always run along.

    \b
    Examples:
      moekit compare moekit:mini --with reap --with easy-ep --with fit --ratio 0.5 --text notes.txt
      moekit compare ./model --with reap/rtn:bits=4 --with gptq --text a=a.jsonl --text b=b.jsonl --seeds 3 --output out
    """
    ratios = _ratios(ratio)
    if not methods:
        raise OptionError("nothing to compare: name methods with --with, such as --with reap --with gptq")
    if not text:
        raise OptionError("no text to calibrate and judge on: give --text FILE")
    if output is not None:
        check_output(output, overwrite)
    with _show.progress(f"compare on {model}") as advance:
        found = _compared(model, methods, ratios, range(1, seeds + 1), text, max_tokens, advance)
    if output is not None:
        _pareto.write(found, output)
    if as_json:
        _show.emit(found.to_json())
    else:
        show(found)
        if output is not None:
            _show.say(f"Written: {output}/compare.json, compare.html" + (", compare.png" if _pareto.can_plot() else ""))


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--ratio {text} is no list of shares, such as 0.25,0.5,0.75") from None


def _compared(
    model: str,
    methods: list[str],
    ratios: list[float],
    seeds: Any,
    text: list[str],
    max_tokens: int | None,
    advance: Any,
) -> "Comparison":
    import torch

    from moekit.checkpoint import Checkpoint
    from moekit.compress import Arena, OwnTexts, compare
    from moekit.profile import Profile, profile, read_texts
    from moekit.stream import LoadedModel

    source = Checkpoint.open(model)
    texts = read_texts(text, source.tokenizer())
    runner = LoadedModel.load(source, dtype=torch.float32)

    def observe(seed: int, held_out: float) -> Profile:
        return profile(
            runner,
            texts,
            max_tokens=max_tokens,
            held_out=held_out,
            seed=seed,
            sample=4096,
            tokenizer=source.tokenizer(),
        )

    return compare(
        Arena(source, runner, OwnTexts(observe)), methods, ratios, list(seeds), model=model, progress=advance
    )


def show(found: "Comparison") -> None:
    """A table per ratio, the least loss first."""
    for ratio in found.ratios:
        rows = [row for row in found.rows() if row.ratio == ratio]
        _show.say(f"{ratio:.0%} of the bytes removed:")
        _show.table(
            ("method", "setting", "size", "KL, nats per token", *rows[0].domains) if rows else ("method",),
            [
                (
                    row.method,
                    row.setting,
                    _show.gigabytes(row.nbytes),
                    str(row.kl),
                    *(f"{one.mean:.3g}" for one in row.domains.values()),
                )
                for row in rows
            ],
        )
        for name in (name for name, at in found.left_out if at == ratio):
            _show.say(f"  {name}: no setting is that small")
        _show.say("")
