"""Making a profile: a model, some text, and what its routers and experts did with it."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from moekit.blocks import blocks as find_blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import MoekitError, OptionError, TextError, UnsupportedModelError
from moekit.profile._choose import choose, prefill_cells
from moekit.profile._decode import Generation
from moekit.profile._reservoir import Quota
from moekit.profile._sequences import Batch, TokenSequence, batches, cut, share
from moekit.profile._watch import Watch, kept_bytes
from moekit.profile.document import Profile
from moekit.profile.schema import ALWAYS, DEFAULT, FIELDS, SAMPLE_KEYS
from moekit.profile.texts import Document, check_texts
from moekit.stream import Beside, LoadedModel, StreamedModel, cap, open_model

Runnable: TypeAlias = str | os.PathLike[str] | Checkpoint | PreTrainedModel | LoadedModel | StreamedModel
BATCH_TOKENS = 2048
"""Tokens that run together. The same in memory and streamed, so that both give the same sums."""


@dataclass(frozen=True)
class _Subject:
    """The model to observe, whatever the caller named it by."""

    runner: LoadedModel | StreamedModel
    source: str
    name: str
    tokenizer: Any


def profile(
    model: Runnable,
    texts: Mapping[str, Iterable[Document]],
    *,
    max_tokens: int | None = None,
    sequence_length: int = 512,
    statistics: Sequence[str] | None = None,
    decode_tokens: int = 0,
    held_out: float = 0.1,
    sample: int = 64,
    balanced: float = 0.0,
    trace: int = 4096,
    max_ram: int | float | str | None = None,
    device: str = "auto",
    seed: int = 0,
    tokenizer: Any = None,
    part: tuple[int, int] = (0, 1),
    then: Callable[[StreamedModel], int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Observe every MoE layer of ``model`` while it reads ``texts`` (documents, or their token ids, by domain).

    Args:
        model: a checkpoint (folder, cached hub id, ``moekit:NAME``), a runner, or a live model with its ``tokenizer``.
        max_tokens: tokens to observe in all, shared equally by the domains; None for all there are.
        sequence_length: documents are cut into pieces of this many tokens, each read by itself.
        statistics: names from ``schema.FIELDS``; the default set if None. Counts are always kept.
        decode_tokens: generate this many tokens greedily after each piece and observe them as decode. In memory only.
        held_out: share of each domain's pieces kept aside, unread, for measuring later.
        sample: tokens of each layer whose hidden states and routing are kept as they are, domains in turn.
        balanced: more sampled tokens where they are needed for every expert to have this many times its even share
            (K / E of ``sample``); EAQuant uses 2.0. Who has fewer all the same: ``Profile.undersampled``.
        trace: most tokens whose routing alone is kept.
        max_ram: cap on the process's resident set; the model is streamed where it does not fit.
        seed: of the choice of pieces and samples.
        part: (number, of how many): observe only this part of the text; all parts merged are the whole profile.
        then: bytes that what follows takes beside the profile, told by the streamed model: a cap too small for that is
            refused before anything runs.
        progress: told (done, total) as layers, or batches in memory, finish.

    Raises:
        TextError, CheckpointError, UnsupportedModelError, BudgetError, OptionError: see ``moekit.errors``.
    """
    documents, names = check_texts(texts), _names(statistics)
    _check_options(max_tokens, sequence_length, decode_tokens, held_out, sample, trace, len(documents))
    _check_balanced(balanced, sample)
    quota, after = Quota(sample, balanced), then or (lambda runner: 0)

    def beside(runner: StreamedModel) -> Beside:
        return kept_bytes(find_blocks(runner.model, shared=True), names, quota), after(runner)

    subject = _subject(model, tokenizer, device, max_ram, beside)
    runner, domains = subject.runner, tuple(documents)
    length = min(sequence_length, _longest(runner.model) - decode_tokens)
    sequences, aside = cut(
        documents, subject.tokenizer, length=length, max_tokens=max_tokens, held_out=held_out, seed=seed
    )
    _check_ids(sequences, runner.model)
    pad = subject.tokenizer.pad_token_id or 0
    grouped = batches(sequences, tokens=BATCH_TOKENS, pad=pad, padded=not decode_tokens)
    if part[1] > 1:
        sequences, grouped = share(sequences, grouped, *part)
        aside = aside if part[0] == 0 else {}
    chosen = choose(sequences, sample=sample, trace=trace, decode=decode_tokens, seed=seed)
    watch = Watch(_moe_blocks(subject), names, len(domains), quota, len(chosen.trace))
    kept = kept_bytes(watch.blocks, names, quota, sum(len(s.ids) for s in sequences))
    cap(max_ram).require(kept, "keeping samples and second moments of every layer")
    if isinstance(runner, StreamedModel) and grouped:
        widest = max(grouped, key=lambda batch: batch.ids.numel()).inputs()
        needed = max(runner.needed_bytes(widest, logits=False), after(runner))
        runner.cap.require(kept + needed, "profiling the model layer by layer, with what comes after it,")
    tell = progress or (lambda done, total: None)
    if decode_tokens:
        _check_generates(runner)
        Generation(runner.model, watch, sequences, chosen, len(domains), decode_tokens).run(grouped, tell)
    else:
        cells = [prefill_cells(batch, sequences, chosen, len(domains)) for batch in grouped]
        _read(runner, watch, grouped, cells, tell)
    options = {
        "sequence_length": length, "max_tokens": max_tokens, "decode_tokens": decode_tokens, "held_out": held_out,
        "sample": sample, "balanced": balanced, "trace": trace, "seed": seed, "sequences": len(sequences),
    }  # fmt: skip
    return Profile(subject.source, subject.name, domains, watch.layers(domains), aside, options, chosen.trace)


def _read(
    runner: LoadedModel | StreamedModel,
    watch: Watch,
    grouped: Sequence[Batch],
    cells: Sequence[Any],
    tell: Callable[[int, int], None],
) -> None:
    with watch.attached(lambda: (runner.batch, cells[runner.batch])):
        for _ in runner.forward([batch.inputs() for batch in grouped], logits=False, on_layer=tell):
            pass


def _names(statistics: Sequence[str] | None) -> list[str]:
    for name in statistics or ():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)
            raise OptionError(f"unknown statistic '{name}': did you mean '{near[0]}'? Known: {', '.join(FIELDS)}")
    wanted = set(DEFAULT if statistics is None else statistics) | set(ALWAYS)
    if any(FIELDS[name].axes[0] == "s" for name in wanted):
        wanted |= set(SAMPLE_KEYS)
    return [name for name in FIELDS if name in wanted]


def _check_options(
    max_tokens: int | None, length: int, decode: int, held_out: float, sample: int, trace: int, domains: int
) -> None:
    if max_tokens is not None and max_tokens < 2 * domains:
        raise OptionError(f"max_tokens is {max_tokens}: at least 2 are needed for each of the {domains} domains")
    if length < 2:
        raise OptionError(f"sequence_length is {length}: at least 2 tokens make a sequence")
    if not 0 <= held_out <= 0.5:
        raise OptionError(f"held_out is {held_out}: give a share between 0 and 0.5")
    for name, value in (("decode_tokens", decode), ("sample", sample), ("trace", trace)):
        if value < 0:
            raise OptionError(f"{name} is {value}: it cannot be negative")


def _check_balanced(balanced: float, sample: int) -> None:
    if not (math.isfinite(balanced) and balanced >= 0):
        raise OptionError(f"balanced is {balanced}: give a multiple of an even share, such as 2.0, or 0 for none")
    if balanced and not sample:
        raise OptionError(f"balanced is {balanced}, but no tokens are sampled: give a sample above 0")


def _check_ids(sequences: Sequence[TokenSequence], model: PreTrainedModel) -> None:
    size = model.config.get_text_config().vocab_size
    if (largest := max(int(s.ids.max()) for s in sequences)) >= size:
        raise TextError(
            f"the text holds token {largest}, but the model's vocabulary ends at {size - 1}: wrong tokenizer?"
        )


def _subject(
    model: Runnable,
    tokenizer: Any,
    device: str,
    max_ram: int | float | str | None,
    beside: Callable[[StreamedModel], Beside],
) -> _Subject:
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise OptionError("a live model needs its tokenizer: pass tokenizer=...")
        return _Subject(LoadedModel(model), _fingerprint(model), type(model).__name__, tokenizer)
    if isinstance(model, LoadedModel | StreamedModel):
        runner = model
    else:
        runner = open_model(model, device, max_ram, beside=beside)
    if runner.checkpoint is None:
        return _subject(runner.model, tokenizer, device, max_ram, beside)
    checkpoint = runner.checkpoint
    return _Subject(runner, checkpoint.fingerprint, _name(checkpoint.path), tokenizer or checkpoint.tokenizer())


def _name(path: Path) -> str:
    """The folder's name; for a snapshot in the hub's cache, the repository's."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def _fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of the checkpoint a live model was loaded from, else a hash of its configuration and shapes."""
    try:
        return Checkpoint.open(model.name_or_path).fingerprint
    except (MoekitError, OSError):
        shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict().items()]
        return hashlib.sha256((model.config.to_json_string() + repr(shapes)).encode()).hexdigest()


def _moe_blocks(subject: _Subject) -> list[Any]:
    found = find_blocks(subject.runner.model, shared=True)
    if subject.runner.model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{subject.name} is an encoder-decoder model: only decoder-only models can be profiled"
        )
    return found


def _longest(model: PreTrainedModel) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 2 else 1 << 30


def _check_generates(runner: LoadedModel | StreamedModel) -> None:
    if isinstance(runner, StreamedModel):
        raise OptionError("decode_tokens needs the model in memory: raise the memory cap, or leave decode_tokens at 0")
    if not runner.model.can_generate():
        raise OptionError(f"{type(runner.model).__name__} cannot generate: leave decode_tokens at 0")
