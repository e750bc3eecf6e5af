"""`moekit reproduce`: run the experiment that tries a paper's claim."""

from pathlib import Path
from typing import Annotated

import typer

from moekit.cli import _show
from moekit.cli._options import Json
from moekit.errors import OptionError


def reproduce(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A paper's key, number or arXiv id.")],
    seeds: Annotated[str, typer.Option("--seeds", metavar="A,B,C", help="Seeds, separated by commas.")] = "11,12,13",
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Your own text as one more domain to try it on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Try a paper's claim at our scale: method and baselines at equal budget, over seeds, with a verdict.

    \b
    Examples:
      moekit reproduce easy-ep
      moekit reproduce easy-ep --seeds 1,2,3,4,5 --text mine.txt --json
    """
    from moekit.lab.experiments import run

    with _show.progress(f"reproduce {key}") as advance:
        result = run(key, seeds=numbers(seeds), text=text, advance=advance)
    if as_json:
        _show.emit(result)
        return
    from moekit.systems import flat

    _show.table((result["key"], result["verdict"]), list(flat(result["figures"]).items()))


def numbers(text: str) -> tuple[int, ...]:
    """Seeds, as an option names them."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--seeds {text!r} is no list of whole numbers: write them as 11,12,13") from None
    if len(set(seeds)) < 2:
        raise OptionError(f"--seeds {text!r} names {len(set(seeds))} seed: an interval needs at least 2 different ones")
    return seeds
