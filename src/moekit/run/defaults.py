"""How a model is paged unless one says otherwise: what tuning found for it on this machine, else what is usual."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from moekit.checkpoint import Checkpoint
from moekit.errors import OutputError


@dataclass(frozen=True, order=True)
class Choice:
    """A policy by name, and how many experts of the next layer are read ahead."""

    policy: str
    ahead: int = 0

    def __str__(self) -> str:
        return f"{self.policy}, {self.ahead} ahead" if self.ahead else self.policy


def usual(share: float, top_k: int) -> Choice:
    """For a model that nobody tuned, with memory for a ``share`` of its experts.

    Replayed traces of the embedded model had fewest misses and fewest bytes under several terms at every share from an
    eighth to three quarters, once a token's worth of experts is read ahead. Where all fit there is nothing to choose.
    """
    return Choice("lru") if share >= 1 else Choice("multi-term", top_k)


def folder() -> Path:
    """Where choices are kept: ``moekit/paging`` in the user's cache. Models are never written to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "paging"


def remember(checkpoint: Checkpoint, choice: Choice) -> Path:
    """Keep a choice for a model; returns the file. Raises :class:`OutputError` where it cannot be written."""
    path = folder() / f"{checkpoint.fingerprint}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        made.write_text(json.dumps({"policy": choice.policy, "ahead": choice.ahead}) + "\n", "utf-8")
        made.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    return path


def remembered(checkpoint: Checkpoint) -> Choice | None:
    """What was kept for a model; a file that says nothing sensible counts as none."""
    try:
        found = json.loads((folder() / f"{checkpoint.fingerprint}.json").read_text("utf-8"))
        return Choice(str(found["policy"]), int(found["ahead"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
