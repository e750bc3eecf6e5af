"""`moekit tune`: how a model is best paged on this machine, for these prompts."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moekit.cli import _show, _speed
from moekit.cli._options import Json, Model, Text
from moekit.cli.run import MEMORY_HELP
from moekit.errors import OptionError

_SHARES = (1.0, 0.5, 0.25, 0.125)


def tune(
    model: Model,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help=MEMORY_HELP)] = None,
    text: Text = [],  # noqa: B006
    prompts: Annotated[int, typer.Option("--prompts", metavar="N", min=1, help="Documents tried, at most.")] = 4,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Of each document, from its beginning.")
    ] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", min=2, help="After each prompt.")] = 16,
    curve: Annotated[
        Path | None,
        typer.Option("--curve", metavar="FILE", help="Draw memory against speed: FILE.png or FILE.html."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure every cache policy on your own prompts, cold, warm and rotating, and keep the best for this model.

    `run` and `serve` use what was found. The choice is kept in your cache folder, never in the model's.

    \b
    Examples:
      moekit tune ./Qwen3-30B-A3B --memory 8GB --text prompts.jsonl
      moekit tune moekit:mini --memory 700MB --text notes.txt --curve speed.html
    """
    if curve is not None:
        _speed.check(curve)
    if not text:
        raise OptionError("tuning runs your prompts: give --text FILE")
    from moekit.checkpoint import Checkpoint
    from moekit.profile import read_texts
    from moekit.run import load, paging, prompt_ids
    from moekit.run.defaults import remember
    from moekit.run.tune import best, curve_of
    from moekit.run.tune import tune as measure

    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.tokenizer()
    documents = [document for own in read_texts(text, tokenizer).values() for document in own][:prompts]
    tried = [prompt_ids(tokenizer, document, chat=False)[:, :prompt_tokens] for document in documents]
    opened = load(checkpoint, memory, context=prompt_tokens + new_tokens)
    with _show.progress(f"tune {model}") as advance:
        measured = measure(opened, tried, new_tokens, progress=advance)
        choice = best(measured)
        points = curve_of(opened, tried, choice, _SHARES, new_tokens) if curve is not None else []
    path = remember(checkpoint, choice)
    if curve is not None:
        _speed.write(points, curve, f"{model}: memory for experts and speed")
    budget = paging(opened).store.budget
    if as_json:
        plain = {"measured": [asdict(one) for one in measured], "curve": [asdict(point) for point in points]}
        _show.emit({"best": asdict(choice), "kept": path, "budget": budget, **plain})
        return
    rows = [
        (str(one.choice), one.regime, 1 / one.seconds, one.hit_rate, _show.gigabytes(one.nbytes)) for one in measured
    ]
    _show.table(("choice", "regime", "tokens/s", "hit rate", "read a token"), rows)
    _show.say(f"best: {choice}, with {_show.gigabytes(budget)} for experts; kept for this model in {path}")
