"""Proof that an output loads: by stock transformers in a fresh process, or by names, shapes and dtypes alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import moekit
from moekit.errors import OutputError
from moekit.plan.loadable import problems

SCRIPT = Path(__file__).with_name("reload_check.py")


def reload_in_fresh_process(folder: Path, *, with_moekit: bool, excused: Collection[str] = ()) -> dict[str, Any]:
    """What a new Python process found when it loaded ``folder``; ``with_moekit`` lets it import moekit first.

    ``excused``: what stock transformers says of the source too (weights of prediction layers it has no place for).

    Raises:
        OutputError: it does not load, loads in part, or computes something that is not finite.
    """
    command = [sys.executable, "-P", str(SCRIPT), str(folder)]
    if with_moekit:
        command.append(str(Path(moekit.__file__).parent.parent))
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise OutputError(f"{folder} is not published: the process that reloads it died ({last})") from None
    problem = reload_problem(found, excused)
    if problem:
        raise OutputError(f"{folder} is not published: stock transformers {problem}")
    return {"how": "loaded in a fresh process", "imports": ["moekit"] if with_moekit else [], **found}


def reload_problem(found: dict[str, Any], excused: Collection[str] = ()) -> str | None:
    """What is wrong with a reload beyond what is excused, in words, or None."""
    if "error" in found:
        return f"cannot load it: {found['error']}"
    if wrong := [one for one in problems(found) if one not in excused]:
        return f"loads it with {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
    return None if found.get("finite", True) else "computes logits that are not finite from it"
