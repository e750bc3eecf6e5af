"""Arguments and options that several commands share, so that they read and mean the same everywhere."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, a hub id in the local cache, or moekit:NAME.")
]
Text = Annotated[
    list[str],
    typer.Option(
        "--text", metavar="[DOMAIN=]FILE", help="Text: a plain file, or JSONL with text or chat messages. Repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else.")]
MaxRam = Annotated[
    str | None,
    typer.Option("--max-ram", metavar="SIZE", help="Cap on this process's peak memory, such as 3GB (10^9 bytes)."),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", metavar="FILE", help="A profile made by `moekit profile`, in place of text.")
]
OutputDir = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write; must not exist yet.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Observe at most this many tokens in all.")
]
With = Annotated[
    list[str],
    typer.Option(
        "--with",
        metavar="METHOD[@LAYERS][:KEY=VALUE,...]",
        help="A method with its options. Repeatable: applied in order. With @ and a pattern, such as "
        "model.layers.[0-3].*, other options for those layers.",
    ),
]
Against = Annotated[str, typer.Option("--against", metavar="MODEL", help="The model it was made from.")]
Length = Annotated[int, typer.Option("--length", metavar="N", min=2, help="Tokens in one training sequence.")]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Sequences in one training step.")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="auto, stock, moekit, or compressed-tensors. auto: stock where it can say the plan, else moekit.",
    ),
]
Materialise = Annotated[
    bool,
    typer.Option("--materialise", help="Pad layers and repeat shared experts, so that a stock format can hold it."),
]
HeldOut = Annotated[
    list[str],
    typer.Option("--held-out", metavar="[DOMAIN=]FILE", help="Text to measure the result on, not to choose by."),
]
Task = Annotated[
    Path | None,
    typer.Option(
        "--task", metavar="FILE", help="JSONL of prompt, answer: what methods search by that count wrong answers."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a command computes, and what it may take."""

    max_ram: MaxRam = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a command that trains cuts its text, and where it computes."""

    length: Length = 256
    batch: Batch = 8
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a plan is chosen by: a profile, or text to make one from."""

    profile: ProfileFile = None
    text: Text = field(default_factory=list)
    max_tokens: MaxTokens = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """How a model is written."""

    format: Format = "auto"
    materialise: Materialise = False
    overwrite: Overwrite = False
