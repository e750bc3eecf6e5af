"""`moekit league`: recipes against each other at equal compute."""

import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from moekit.cli import _show
from moekit.cli._options import Json
from moekit.cli.reproduce import numbers
from moekit.errors import OutputError


def league(
    recipes: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="RECIPE", help="A key or a TOML file. Repeatable; all by default."),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="A,B,C", help="Seeds, separated by commas.")] = "11,12,13",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.md", help="Write the document, and FILE.png beside it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train recipes by the lab's protocol, at equal compute, and compare them with plain top-k routing.

    About two minutes of a core for each recipe and seed; what was trained before is not trained again.

    \b
    Examples:
      moekit league --with moge --with momentum-smoe
      moekit league --seeds 11,12,13 --output docs/architectures.md
    """
    if output is not None and (output.suffix != ".md" or not output.parent.is_dir()):
        raise OutputError(f"--output {output} must be a .md file in a folder that exists")
    from torch import get_num_threads

    from moekit.lab.league import can_draw, draw, entrants, markdown, standings

    drawn = numbers(seeds)
    if output is not None:
        can_draw()
    with _show.progress("league") as advance:
        rows = standings(entrants(recipes or []), drawn, advance)
    if output is not None:
        command = " ".join(["moekit league", *(f"--with {one}" for one in recipes or []), f"--seeds {seeds}"])
        where = f"{platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
        about = f"Written by `{command}` on {date.today()}, {where}, threads: {get_num_threads()}."
        output.write_text(markdown(rows, drawn, about), encoding="utf-8")
        draw(rows, output.with_suffix(".png"))
    if as_json:
        _show.emit([row.as_dict() for row in rows])
        return
    _show.table(
        ("recipe", "bits per byte", "lead over plain", "compute"),
        [(row.recipe, row.bits_per_byte, row.lead, f"{row.compute:.2f}") for row in rows],
    )
