"""The miniature world: real texts, exact tasks, small trained models; texts and tasks import no torch."""

from pathlib import Path
from typing import Any

from moekit.errors import CheckpointError, OptionError
from moekit.lab._splits import SPLITS
from moekit.lab.tasks import ABSTAIN, MARKER, TASKS, Example, Task, examples, stream, task
from moekit.lab.texts import TEXTS, documents, passages

__all__ = [
    "ABSTAIN",
    "DOMAINS",
    "MARKER",
    "SPLITS",
    "TASKS",
    "TEXTS",
    "Example",
    "Task",
    "dense",
    "documents",
    "examples",
    "mini",
    "mixture",
    "task",
    "text",
]

DOMAINS: tuple[str, ...] = TEXTS + TASKS
_DATA = Path(__file__).resolve().parent.parent / "data"
_DEFAULT_BYTES = 65_536


def text(domain: str, split: str, max_bytes: int | None = None, seed: int = 0) -> str:
    """Return text of a domain and split: whole documents in a fixed order, or `max_bytes` of passages drawn by `seed`.

    For a task, lines of `prompt + answer` (64 KiB where `max_bytes` is None). Never longer than `max_bytes` in UTF-8.
    Raises OptionError for an unknown domain or split, TextError where this machine has no such files.
    """
    if domain not in DOMAINS:
        raise OptionError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    if max_bytes is not None and max_bytes < 1:
        raise OptionError(f"max_bytes is {max_bytes}: ask for 1 byte or more")
    if domain in TEXTS and max_bytes is None:
        return "\n".join(body for _, body in documents(domain, split))
    limit = max_bytes or _DEFAULT_BYTES
    if domain in TEXTS:
        pieces = passages(domain, split, seed)
    else:
        pieces = (f"{prompt}{answer}\n" for prompt, answer in stream(domain, split, seed))
    taken, size = [], 0
    while size < limit:
        piece = next(pieces)
        taken.append(piece)
        size += len(piece.encode("utf-8", "replace"))
    return "".join(taken).encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")


def mixture(seed: int, tokens: int, length: int) -> Any:
    """Batches (step -> ``input_ids``, ``weight``) of the mixture that the dense embedded model was trained on.

    So many ``tokens`` a step in rows of ``length`` of one domain each; answers weigh more than prompts.
    """
    from dataclasses import replace

    from moekit.lab._batches import Batches
    from moekit.lab._recipe import RECIPES

    source = Batches(replace(RECIPES["dense"], seed=seed, tokens_per_step=tokens, context=length, long_share=0.0))
    return lambda step: dict(zip(("input_ids", "weight"), source.batch(step), strict=True))


def mini() -> Path:
    """Return the folder of the embedded Mixture-of-Experts model (`moekit:mini`); CheckpointError if missing."""
    return _embedded("mini")


def dense() -> Path:
    """Return the folder of its dense sibling (`moekit:dense`); CheckpointError if missing."""
    return _embedded("dense")


def _embedded(name: str) -> Path:
    folder = _DATA / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the embedded model {name!r} is not in {_DATA}: reinstall moekit with its package data")
    return folder
