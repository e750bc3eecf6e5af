"""Method headers: the fixed fields at the top of a paper's file (docstring or comment), never imported."""

import ast
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
FIELDS = ("Paper", "Method", "Uses", "Differs", "Claim", "Shown")
NOT_TRIED = "not tried"
"""The `Shown` field of a method whose claim no experiment has tried."""

_FIELD = re.compile(rf"^({'|'.join(FIELDS)}):[ \t]*(.*)$")
_EXPERIMENT = re.compile(r"^lab\.experiments\.(\w+)")


@dataclass(frozen=True, kw_only=True)
class Header:
    """One method file's header. `where` is a path inside the package; `problems` is empty when all fields are right."""

    key: str
    where: str
    summary: str
    fields: dict[str, str]
    problems: tuple[str, ...]

    @property
    def arxiv(self) -> str | None:
        """The arXiv id that the Paper field names, such as 2403.08245."""
        found = re.search(r"\b\d{4}\.\d{5}\b", self.fields.get("Paper", ""))
        return found.group() if found else None

    @property
    def number(self) -> int | None:
        """The row of the catalogue that the Paper field claims by `(n 17)` or `(n 17, arXiv ...)`."""
        found = re.search(r"\(n (\d+)[,)]", self.fields.get("Paper", ""))
        return int(found.group(1)) if found else None

    @property
    def experiment(self) -> str | None:
        """The module under `lab.experiments` that tries the claim, or None."""
        found = _EXPERIMENT.match(self.fields.get("Shown", ""))
        return found.group(1) if found else None


def parse(source: str, key: str, where: str = "") -> Header | None:
    """Read the header from a module's source; None where its docstring has no `Paper:` line (then it is no paper's)."""
    return read(ast.get_docstring(ast.parse(source)) or "", key, where)


def parse_recipe(source: str, key: str, where: str = "") -> Header | None:
    """Read the header from the comment that a recipe opens with."""
    comment = takewhile(lambda line: line.startswith("#"), source.splitlines())
    return read("\n".join(line.removeprefix("#").removeprefix(" ") for line in comment), key, where)


def read(text: str, key: str, where: str) -> Header | None:
    """The header in a text of fields, each with its lines; None without a `Paper:` line."""
    parts: dict[str | None, list[str]] = {None: []}
    current: str | None = None
    for line in text.splitlines():
        matched = _FIELD.match(line)
        if matched:
            current, line = matched.group(1), matched.group(2)
        elif not line.strip() and current is not None:
            current = "after"
        parts.setdefault(current, []).append(line.strip())
    summary = " ".join(parts.pop(None)).strip()
    parts.pop("after", None)
    fields = {name: " ".join(lines).strip() for name, lines in parts.items() if name}
    if "Paper" not in fields:
        return None
    return Header(key=key, where=where, summary=summary, fields=fields, problems=tuple(_problems(fields)))


def _problems(fields: dict[str, str]) -> list[str]:
    missing = [f"{name}: missing or empty" for name in FIELDS if not fields.get(name)]
    order = [name for name in fields if name in FIELDS]
    if order != sorted(order, key=FIELDS.index):
        missing.append(f"fields stand in the order {', '.join(order)}, expected {', '.join(FIELDS)}")
    shown = fields.get("Shown", "")
    if shown and not shown.startswith(NOT_TRIED) and not _EXPERIMENT.match(shown):
        missing.append(f"Shown: {shown!r}, expected 'lab.experiments.<key>' or '{NOT_TRIED}'")
    return missing


def headers(package: Path = PACKAGE) -> list[Header]:
    """Every method header in the rooms of the package: files that do not begin with an underscore, then recipes."""
    found = []
    for path in sorted(package.glob("*/*.py")):
        if not path.name.startswith("_"):
            where = path.relative_to(package).as_posix()
            header = parse(path.read_text("utf-8"), path.stem.replace("_", "-"), where)
            if header:
                found.append(header)
    for path in sorted(package.glob("recipes/*.toml")):
        header = parse_recipe(path.read_text("utf-8"), path.stem, path.relative_to(package).as_posix())
        if header:
            found.append(header)
    return found
