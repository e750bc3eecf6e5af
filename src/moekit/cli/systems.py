"""`moekit systems`: the catalogue of papers."""

from collections import Counter
from typing import Annotated

import typer

from moekit.cli import _show
from moekit.cli._options import Json


def systems(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[KEY | WORDS...]", help="A key, a number, an arXiv id, or words of a title."),
    ] = [],  # noqa: B006
    wing: Annotated[str | None, typer.Option("--wing", metavar="W", help="Only the papers of one wing.")] = None,
    as_json: Json = False,
) -> None:
    """List every paper of the catalogue, those with some words in their title, or show one: where it lives, what it
    claims, what was shown here.

    \b
    Examples:
      moekit systems --wing compress
      moekit systems easy-ep
      moekit systems merging experts
    """
    from moekit import systems as catalogue

    rows = catalogue.records(wing)
    if words:
        rows = [row for row in catalogue.search(" ".join(words)) if row in rows]
    if as_json:
        _show.emit([row.as_dict() for row in rows])
        return
    if len(rows) != 1 or not words:
        count = Counter(row.outcome for row in rows)
        _show.table(
            ("n", "key", "wing", "outcome", "title"),
            [(str(row.n), row.key, row.wing, row.outcome, row.title) for row in rows],
        )
        _show.say("", ", ".join(f"{count[name]} {name}" for name in catalogue.OUTCOMES))
        return
    row = rows[0]
    lines = [("title", row.title), ("wing", row.wing), ("outcome", row.outcome)]
    lines += [(name.lower(), text) for name, text in row.header.items()]
    lines += [("file", f"moekit/{row.where}")] if row.where else []
    _show.table((f"{row.n}", row.key), lines)
    figures = catalogue.flat(row.figures)
    if figures:
        _show.say("")
        _show.table(("figure", "value"), list(figures.items()))
