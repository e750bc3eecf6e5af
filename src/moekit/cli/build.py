"""`moekit build`: a Mixture-of-Experts model of a dense one."""

from pathlib import Path
from typing import Annotated

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, OutputDir, Overwrite, Text, Training
from moekit.cli._work import check_output


@grouped
def build(
    dense: Annotated[
        str, typer.Argument(metavar="DENSE", help="A dense model: a folder, a cached hub id, moekit:NAME.")
    ],
    output: OutputDir,
    method: Annotated[
        str, typer.Option("--with", metavar="METHOD[:KEY=VALUE,...]", help="How experts are made of it.")
    ],
    *,
    text: Text = [],  # noqa: B006
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="JSONL of prompt, chosen, rejected: preferences.")
    ] = None,
    training: Training,
    format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="auto, stock or moekit; auto: stock where it can say it.")
    ] = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make experts of a dense model's layers, train them on text, and write a model that loads like any other.

    \b
    Examples:
      moekit build moekit:dense --with llava-mod:teacher=moekit:mini --text a.txt --output out/sparse
      moekit build ./dense --with mote-ternary:steps=500 --text a.txt --format moekit --output out/ternary
      moekit build ./dense --with sparse-unified:experts=8,top_k=4 --text a.txt --output out/split
    """
    check_output(output, overwrite)
    from moekit.build import Material, builder
    from moekit.build import build as carry_out
    from moekit.checkpoint import Checkpoint
    from moekit.profile import read_texts
    from moekit.train import read_pairs, token_rows

    made, checkpoint = builder(method), Checkpoint.open(dense)
    tokenizer = checkpoint.tokenizer()
    rows = token_rows(read_texts(text, tokenizer), tokenizer, training.length) if text else []
    found = read_pairs(pairs, tokenizer) if pairs else []
    with _show.progress(f"build {dense}") as advance:
        material = Material(rows=rows, pairs=found, batch_size=training.batch, progress=advance)
        built = carry_out(
            checkpoint, made, material, output, format=format, device=training.device, overwrite=overwrite
        )
    report = {**built.report, "output": str(output)}
    if as_json:
        _show.emit(report)
        return
    from moekit.systems import flat

    _show.table((str(output), made.name), list(flat({k: v for k, v in report.items() if k != "reload"}).items()))
