"""The files that belong to a checkpoint besides its weights: tokenizer, templates, generation settings, licence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".merges"}
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_NEVER = {"config.json", "receipt.json", "plan.json", "quantize_config.json", "hf_quant_config.json"}


def companion_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every file worth carrying over, in order of name.

    Never weights in any format, never code, never an index of shards, never what describes another run of moekit.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in _NEVER or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.parent != folder and path.suffix != ".jinja":
            continue
        if name.endswith(".index.json"):
            continue
        if path.suffix in _SUFFIXES or path.name.upper().startswith(_LEGAL):
            yield name, path
