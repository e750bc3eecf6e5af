"""`moekit train`: a Mixture-of-Experts model from a recipe."""

from typing import Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._options import Device, Json, OutputDir, Overwrite, Text
from moekit.cli._work import check_output, leads

HOUSE = "house"


def train(
    *,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or a paper's key: see `moekit systems --wing route`.")
    ] = HOUSE,
    output: OutputDir,
    text: Text = [],  # noqa: B006
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="MODEL", help="Whose tokenizer cuts the text; bytes by default.")
    ] = "moekit:mini",
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="Instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Instead of the recipe's.")] = None,
    device: Device = "auto",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run layers again in the backward: less memory, more time.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a model that a recipe describes, and write it as transformers does, with its metrics and their picture.

    Without --text it learns from the texts and tasks of the lab. Killed, the same command goes on where it was.
    On several processes, GPUs (one each) or machines that see one folder: torchrun --nproc-per-node N -m moekit.cli
    train ...

    \b
    Examples:
      moekit train --output out/house
      moekit train base --output out/plain --device cpu --recompute
      moekit train chain-of-experts --text code=src.txt --steps 1000 --output out/chain
      moekit train ./mine.toml --text a.txt --text b.txt --seed 3 --output out/mine
    """
    check_output(output, overwrite)
    from moekit.checkpoint import Checkpoint
    from moekit.cli._training_plot import draw
    from moekit.train.recipe import Recipe
    from moekit.train.trained import train_to

    changes = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    asked = Recipe.read(recipe).with_options(**changes)
    cutter = Checkpoint.open(tokenizer).tokenizer()
    batches, data = _batches(asked, text, cutter)
    with _show.progress(f"train {recipe}") as advance:
        record = train_to(
            asked,
            batches,
            output,
            data=data,
            tokenizer=cutter,
            device=device,
            recompute=recompute,
            overwrite=overwrite,
            draw=draw,
            progress=advance if leads() else None,
        )
    if not leads():
        return
    report = {"output": str(output), "steps": asked.options.steps, **record.last()}
    if as_json:
        _show.emit(report)
        return
    _show.table((str(output), f"mean of the last steps of {asked.options.steps}"), list(record.last().items()))


def _batches(asked: Any, text: list[str], tokenizer: Any) -> tuple[Any, str]:
    """The batches, and what tells their text from others."""
    if not text:
        from moekit.lab import mixture

        return mixture(asked.options.seed, asked.batch * asked.length, asked.length), "the lab's"
    from moekit.profile import read_texts
    from moekit.train import batches_of, token_rows
    from moekit.train.sequences import fingerprint

    rows = token_rows(read_texts(text, tokenizer), tokenizer, asked.length)
    return batches_of(rows, asked.batch, asked.options.seed), fingerprint(rows)
