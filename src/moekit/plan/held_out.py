"""How far an output is from its source, on text that no method saw.

The source's logits are recorded before the first layer is written and outlive a crash, so that a resumed run does not
read the source again; the two models are never in memory together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moekit.checkpoint.headers import read_header
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.shards import layout, write_shard
from moekit.errors import OutputError, TextError
from moekit.measure import LENGTH, Divergence, Windows, compare, pad_batches, together, windows
from moekit.stream import Runner, memory, open_model, smallest_cap
from moekit.stream.memory import Cap

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

Piece = str | Sequence[int] | np.ndarray
Text = Mapping[str, Iterable[Piece]] | Iterable[Piece]
"""Held-out text: documents, or token ids already cut, in one list or by domain."""

Progress = Callable[[int, int], None]

MAX_RECORDED_BYTES = 2_000_000_000
"""The source's logits take at most this much disk; text beyond it is not used, and the receipt says how much was."""

_BATCH_BYTES = 64_000_000
"""Logits of one batch, in float32: with a large vocabulary a batch is one window."""


def cut(checkpoint: Checkpoint, text: Text) -> Windows:
    """Batches of the text, by domain where it has several. Raises TextError where nothing is left to predict."""
    tokenizer = checkpoint.tokenizer()
    vocabulary = checkpoint.transformers_config.get_text_config().vocab_size
    size = max(1, min(8, _BATCH_BYTES // (LENGTH * vocabulary * 4)))
    domains = text if isinstance(text, Mapping) else {"": text}
    parts = {name: _windows(list(pieces), tokenizer, size) for name, pieces in domains.items()}
    parts = {name: part for name, part in parts.items() if part.num_bytes}
    if not parts:
        raise TextError("the held-out text has nothing to predict: give text of at least two tokens")
    return _within(together(parts), vocabulary)


def _windows(pieces: Sequence[Piece], tokenizer: Any, size: int) -> Windows:
    """Batches of token ids as they are, and of documents cut into windows; none where there is nothing to predict."""
    rows = [[int(i) for i in piece] for piece in pieces if not isinstance(piece, str) and len(piece) > 1]
    documents = [piece for piece in pieces if isinstance(piece, str)]
    batches, sizes = pad_batches(rows, tokenizer, size), [_bytes(row, tokenizer) for row in rows]
    with suppress(TextError):
        found = windows(documents, tokenizer, batch_size=size)
        batches, sizes = [*batches, *found.batches], [*sizes, *found.num_bytes]
    return Windows(tuple(batches), tuple(sizes))


def _bytes(row: Sequence[int], tokenizer: Any) -> float:
    return float(len(tokenizer.decode(row[1:]).encode("utf-8", "replace")))


def _within(text: Windows, vocabulary: int) -> Windows:
    """As many batches as the recording may hold; the first always."""
    kept: list[dict[str, Tensor]] = []
    total = 0
    for batch in text.batches:
        total += batch["input_ids"].numel() * vocabulary * 4
        if kept and total > MAX_RECORDED_BYTES:
            break
        kept.append(batch)
    count = sum(batch["input_ids"].shape[0] for batch in kept)
    if sum(text.num_bytes[:count]) <= 0:
        raise TextError("the held-out text stands for no bytes: give text of at least two tokens")
    return Windows(tuple(kept), text.num_bytes[:count], text.domains[:count])


def fingerprint(text: Windows) -> str:
    """Hash of the tokens, to tell one text from another."""
    digest = hashlib.sha256()
    for batch in text.batches:
        digest.update(str(tuple(batch["input_ids"].shape)).encode())
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()


class Recording:
    """A model's logits on one text, kept in files: a runner that replays what another said."""

    model = None

    def __init__(self, folder: Path, text: Windows, source: str) -> None:
        """``source``: the fingerprint of the model that is recorded."""
        self.text, self.folder = text, folder
        stem = f"{source[:16]}-{fingerprint(text)[:16]}"
        self._files = [folder / f"{stem}-{i:05d}.safetensors" for i in range(len(text.batches))]

    @property
    def complete(self) -> bool:
        return all(file.is_file() for file in self._files)

    def record(self, logits: Iterable[Tensor]) -> None:
        """Write each batch's logits; a file appears only when it is whole."""
        try:
            self.folder.mkdir(exist_ok=True)
            for file, tensor in zip(self._files, logits, strict=True):
                whole = file.with_suffix(".writing")
                write_shard(whole, layout({"logits": tensor.float()}))
                whole.rename(file)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror or error}") from error

    def forward(self, batches: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
        for file, _ in zip(self._files, batches, strict=True):
            yield Reader(file.parent, read_header(file)).read("logits")


class Replay:
    """The source itself as the reference, where nothing needs to outlive a crash: run again each time it is asked."""

    model = None

    def __init__(self, checkpoint: Checkpoint, text: Windows, *, device: str, max_ram: Cap) -> None:
        self.text = text
        self._open = lambda: open_model(checkpoint, device=device, max_ram=max_ram)

    def forward(self, batches: Sequence[dict[str, Tensor]], *, on_layer: Progress | None = None) -> Iterator[Tensor]:
        return self._open().forward(batches, on_layer=on_layer)


def needed_bytes(checkpoint: Checkpoint, text: Windows) -> int:
    """Memory that running the source on the text takes, layer by layer, beyond what is resident now."""
    widest = max(text.batches, key=lambda batch: batch["input_ids"].numel())
    return smallest_cap(checkpoint, widest) - memory.rss() - memory.SLACK


def record_source(
    checkpoint: Checkpoint,
    recording: Recording,
    *,
    device: str = "auto",
    max_ram: Cap | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the source over the text, unless an earlier run of this job did."""
    if not recording.complete:
        runner = open_model(checkpoint, device=device, max_ram=max_ram)
        recording.record(runner.forward(recording.text.batches, on_layer=progress))


def divergence(
    output: Checkpoint,
    recording: Recording | Replay,
    *,
    device: str = "auto",
    max_ram: Cap | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """The output against the recorded source: KL, top-1 agreement, bits per byte of both. ``progress`` is told of
    (done, total) layers, or batches where models run in memory; of both models where the source runs again."""
    both = [0.0, 0.0]

    def tell(side: int, share: int, done: int, total: int) -> None:
        if progress is not None:
            both[side] = done / total
            progress(round(sum(both) * total), share * total)

    result = open_model(output, device=device, max_ram=max_ram)
    if not isinstance(recording, Replay):
        return compare(recording, _Told(result, partial(tell, 1, 1)), recording.text)
    return compare(_Told(recording, partial(tell, 0, 2)), _Told(result, partial(tell, 1, 2)), recording.text)


class _Told:
    """A runner that says how far it is."""

    def __init__(self, runner: Runner | Replay, progress: Progress) -> None:
        self.model, self._runner, self._progress = runner.model, runner, progress

    def forward(self, batches: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
        return self._runner.forward(batches, on_layer=self._progress)
