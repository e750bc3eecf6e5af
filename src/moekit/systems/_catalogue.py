"""All rows of the plan joined with the headers of the files that exist and the results that were recorded."""

import csv
import difflib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from moekit.errors import OptionError
from moekit.systems._header import PACKAGE, Header, headers

OUTCOMES = ("planned", "checked", "shown", "not-shown")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One paper. `where` is its file inside the package (None: no code yet); `figures` are those of its experiment."""

    n: int
    key: str
    title: str
    wing: str
    where: str | None = None
    outcome: str = "planned"
    figures: dict[str, Any] = field(default_factory=dict)
    arxiv: str | None = None
    header: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON takes it."""
        return asdict(self)


def recorded(key: str, package: Path = PACKAGE) -> dict[str, Any] | None:
    """The recorded result of an experiment (`data/results/KEY.json`), as `moekit reproduce KEY --json` wrote it."""
    path = package / "data" / "results" / f"{key}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def outcome(header: Header | None, result: dict[str, Any] | None) -> str:
    """`planned` without a file, else the verdict of the recorded experiment, else `checked`."""
    if header is None:
        return "planned"
    if header.experiment is None or result is None:
        return "checked"
    return result["verdict"]


def join(package: Path = PACKAGE) -> tuple[list[Record], list[Header]]:
    """Return all records in row order, and the headers that belong to no row (methods that are only baselines here)."""
    by_key = {header.key: header for header in headers(package)}
    with (package / "data" / "systems.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    joined = [_record(row, by_key.pop(row["key"], None), package) for row in rows]
    return joined, list(by_key.values())


def _record(row: dict[str, str], header: Header | None, package: Path) -> Record:
    result = recorded(row["key"], package) if header else None
    return Record(
        n=int(row["n"]),
        key=row["key"],
        title=row["title"],
        wing=row["wing"],
        where=header.where if header else None,
        outcome=outcome(header, result),
        figures=result["figures"] if header and header.experiment and result else {},
        arxiv=header.arxiv if header else None,
        header={"Does": header.summary, **header.fields} if header else {},
    )


@cache
def _joined() -> tuple[list[Record], list[Header]]:
    return join()


def records(wing: str | None = None) -> list[Record]:
    """All rows in order, or those of one wing; raises OptionError naming the wings for an unknown one."""
    rows = _joined()[0]
    if wing is None:
        return list(rows)
    wings = sorted({row.wing for row in rows})
    if wing not in wings:
        raise OptionError(f"no wing {wing!r}: choose one of {', '.join(wings)}")
    return [row for row in rows if row.wing == wing]


def extras() -> list[Header]:
    """Methods in the package that are no row of the plan, such as baselines with a paper of their own."""
    return list(_joined()[1])


def find(query: str) -> Record:
    """The row with this key, number or arXiv id; raises OptionError naming the nearest keys where there is none."""
    wanted = _plain(query)
    rows = records()
    for row in rows:
        if wanted in (row.key, str(row.n), row.arxiv):
            return row
    raise OptionError(f"no paper {query!r} in the catalogue: {_hint(wanted, rows)}")


def search(query: str) -> list[Record]:
    """The row that :func:`find` finds, else all whose title has every word of the query (or begins one so), in order.

    Raises OptionError, naming the nearest, where there is none of either.
    """
    wanted = _plain(query)
    rows = records()
    exact = [row for row in rows if wanted in (row.key, str(row.n), row.arxiv)]
    if exact or _ARXIV.fullmatch(wanted):
        return exact or [find(query)]
    asked = _words(query)
    found = [row for row in rows if asked and all(_begins(word, row) for word in asked)]
    return found or [find(query)]


_ARXIV = re.compile(r"\d{4}\.\d{4,5}(v\d+)?")


def _plain(query: str) -> str:
    return re.sub(r"^arxiv:\s*|(?<=\.\d{5})v\d+$", "", query.strip().lower())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _begins(word: str, row: Record) -> bool:
    return any(other.startswith(word) for other in _words(f"{row.title} {row.key}"))


def _hint(wanted: str, rows: list[Record]) -> str:
    if _ARXIV.fullmatch(wanted):
        known = sum(row.arxiv is not None for row in rows)
        return (
            f"only the {known} papers with code here are known by their arXiv id, the others by title; "
            "give words of its title, such as `moekit systems merging experts`"
        )
    near = difflib.get_close_matches(wanted, [row.key for row in rows], n=3)
    asked = set(_words(wanted))
    shared = {row.key: sum(_begins(word, row) for word in asked) for row in rows}
    near += sorted((key for key in shared if shared[key]), key=lambda key: -shared[key])
    near = list(dict.fromkeys(near))[:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"give a key, a number from 1 to {len(rows)}, words of a title, or the arXiv id of a method that has code"
