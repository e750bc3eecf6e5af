"""Experiments that try papers' claims at our scale: one file per paper, found through the method's own header.

An experiment is a module with `run(seeds, text, advance) -> Outcome`. Its docstring states, before anything is run, the
rule that turns figures into a verdict.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit import systems
from moekit.errors import OptionError, TextError

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What an experiment found; `shown` is its rule applied to its figures. `setting` says on what it was run."""

    shown: bool
    figures: dict[str, Any]
    setting: dict[str, Any]


def available() -> dict[str, str]:
    """Paper key -> experiment module name, for every method whose header names one."""
    rows = {row.key for row in systems.records()}
    return {h.key: h.experiment for h in systems.headers() if h.experiment and h.key in rows}


def run(
    key: str,
    seeds: Sequence[int] = (11, 12, 13),
    text: str | Path | None = None,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Run the experiment of a paper and return `key`, `verdict` (shown or not-shown), `figures`, `seeds`, `setting`.

    Raises OptionError for an unknown paper or one without an experiment, TextError for a text that cannot be read.
    """
    row, known = systems.find(key), available()
    if row.key not in known:
        raise OptionError(f"{row.key} has no experiment yet (it is {row.outcome}): choose one of {', '.join(known)}")
    own = _read(Path(text)) if text is not None else None
    outcome = importlib.import_module(f"{__name__}.{known[row.key]}").run(tuple(seeds), own, advance)
    return {
        "key": row.key,
        "verdict": "shown" if outcome.shown else "not-shown",
        "figures": outcome.figures,
        "seeds": list(seeds),
        "setting": {**outcome.setting, "text": Path(text).name if text is not None else None},
    }


def _read(path: Path) -> str:
    from moekit.profile import read_texts

    (documents,) = read_texts([f"own={path}"]).values()
    body = "\n".join(documents)
    if len(body.encode()) < 4096:
        raise TextError(f"{path} has {len(body.encode())} bytes: an experiment needs 4096 or more to split in two")
    return body
