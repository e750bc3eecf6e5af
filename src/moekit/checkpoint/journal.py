"""The journal of a write in progress: one JSON line per finished unit, flushed before the next unit begins.

The first line is the job. A line torn by a crash is dropped on reopening, so the unit it would have named is redone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, and folders cannot be flushed
    fcntl = None  # type: ignore[assignment]

NAME = "journal.jsonl"


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fsync_folder(folder: Path) -> None:
    """Make creations and renames inside ``folder`` durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every whole record of a journal and the bytes they take; ([], 0) if there is none."""
    records: list[dict[str, Any]] = []
    size = 0
    if not path.is_file():
        return records, size
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        records.append(record)
        size += len(line)
    return records, size


class Journal:
    """The journal file of one folder, held locked so that two processes never write one output.

    ``records`` are the lines found on opening, without the job.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], *, restart: bool = False) -> None:
        """Open or begin the journal; ``restart`` forgets one that belongs to a different job.

        Raises:
            OutputError: another process holds it, or it belongs to a different job.
        """
        path = folder / NAME
        self._file = path.open("a+b")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise OutputError(f"{folder} is being written by another process; wait for it or stop it") from None
        records, size = read(path)
        if records and canonical(records[0].get("job")) != canonical(job):
            if not restart:
                self._file.close()
                raise OutputError(
                    f"{folder} holds the unfinished output of another job ({_difference(records[0].get('job'), job)}); "
                    "repeat that job to finish it, or pass --overwrite to start anew"
                )
            records, size = [], 0
        self._file.truncate(size)
        if not records:
            self.add({"job": dict(job)})
            fsync_folder(folder)
        self.records = records[1:]

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one line; on return it survives a power failure."""
        self._file.write((canonical(record) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _difference(found: Any, given: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "of unknown origin"
    names = sorted(k for k in found.keys() | given.keys() if canonical(found.get(k)) != canonical(given.get(k)))
    return "different " + ", ".join(names)
