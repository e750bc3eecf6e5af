"""Files of records: JSONL whose every line is an object with the same texts in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moekit.errors import TextError


def read_records(path: str | Path, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts under ``keys`` of every line that is not empty, in this order; further keys are passed over.

    Raises:
        TextError: a file that cannot be read, holds no record, or has a line that lacks one of the texts or has an
            empty one.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise TextError(f"{path} cannot be read: {reason}") from None
    found = [_record(path, number, line, keys) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise TextError(f"{path} holds no record: give lines of JSON with the texts {', '.join(keys)}")
    return found


def _record(path: Path, number: int, line: str, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    texts = [text for key in keys if isinstance(said, dict) and isinstance(text := said.get(key), str) and text]
    if len(texts) < len(keys):
        raise TextError(f"{path}, line {number}: expected JSON with the texts {', '.join(keys)}, found {line[:60]!r}")
    return tuple(texts)
