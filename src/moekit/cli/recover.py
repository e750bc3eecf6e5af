"""`moekit recover`: short distillation after compression."""

from typing import Annotated

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Against, Json, OutputDir, Overwrite, Text, Training
from moekit.cli._work import check_output
from moekit.errors import OptionError


@grouped
def recover(
    compressed: Annotated[str, typer.Argument(metavar="OUT", help="The compressed model's folder.")],
    against: Against,
    output: OutputDir,
    *,
    text: Text = [],  # noqa: B006
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Training steps.")] = 100,
    train: Annotated[
        list[str],
        typer.Option("--train", metavar="PART", help="router, norms, scales, experts, shared or rewrite. Repeatable."),
    ] = ["router"],  # noqa: B006
    learning_rate: Annotated[float, typer.Option("--learning-rate", metavar="X", help="Peak learning rate.")] = 1e-3,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="Of the KL divergence.")] = 1.0,
    lm: Annotated[float, typer.Option("--lm", metavar="W", help="Weight of the loss on the text itself.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Order of the text.")] = 0,
    training: Training,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Let a compressed model learn from its source what it lost, and write it to a new folder.

    What was lost before and after is measured on an eighth of the text, which is not trained on.

    \b
    Examples:
      moekit recover out/half --against moekit:mini --text notes.txt --output out/half-recovered
      moekit recover out/half --against moekit:mini --text notes.txt --train router --train experts --steps 300 \\
        --output out/half-trained
      moekit recover out/vectors --against moekit:mini --text notes.txt --train rewrite --train experts --lm 1 \\
        --output out/vectors-trained
    """
    check_output(output, overwrite)
    if not text:
        raise OptionError("recovery trains on text: give --text FILE")
    from moekit.checkpoint import Checkpoint
    from moekit.plan.reload import reload_in_fresh_process
    from moekit.profile import read_texts
    from moekit.train import Objective, TrainOptions, token_rows
    from moekit.train import recover as carry_out
    from moekit.train.recovered import is_packed

    checkpoint = Checkpoint.open(compressed)
    tokenizer = checkpoint.tokenizer()
    rows = token_rows(read_texts(text, tokenizer), tokenizer, training.length)
    with _show.progress(f"recover {compressed}") as advance:
        own = is_packed(checkpoint) or checkpoint.own_class
        done = carry_out(
            checkpoint,
            against,
            rows,
            output,
            what=train,
            options=TrainOptions(steps=steps, learning_rate=learning_rate, seed=seed),
            objective=Objective(temperature=temperature, lm=lm),
            batch_size=training.batch,
            device=training.device,
            overwrite=overwrite,
            check=lambda folder: reload_in_fresh_process(folder, with_moekit=own),
            progress=advance,
        )
    report = {**done.as_dict(), "output": str(output)}
    if as_json:
        _show.emit(report)
        return
    rows_shown = [
        (name, done.before[name], done.after[name]) for name in ("kl", "agreement", "nll_source", "nll_output")
    ]
    _show.table((str(output), "training-free", f"after {steps} steps"), rows_shown)
