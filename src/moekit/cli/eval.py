"""`moekit eval`: what a model scores."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from moekit.cli import _receipt, _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, Model, Text
from moekit.errors import OptionError


@grouped
def evaluate(
    model: Model,
    *,
    text: Text = [],  # noqa: B006
    task: Annotated[
        list[str], typer.Option("--task", metavar="TASK", help="An exact task of the lab, or `all`. Repeatable.")
    ] = [],  # noqa: B006
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="A reference: divergence from it on the text.")
    ] = None,
    efficiency: Annotated[
        bool, typer.Option("--efficiency", help="Also memory, latency, throughput and size, on the text.")
    ] = False,
    examples: Annotated[int, typer.Option("--examples", metavar="N", min=1, help="Examples of each task.")] = 200,
    length: Annotated[int, typer.Option("--length", metavar="N", min=2, help="Tokens in one window of text.")] = 512,
    machine: Machine,
    as_json: Json = False,
) -> None:
    """Measure bits per byte on text, exact match on tasks, and the divergence from a reference model.

    \b
    Examples:
      moekit eval moekit:mini --text notes.txt --task arithmetic
      moekit eval out/half --against moekit:mini --text code=a.py --text prose=b.txt --json
    """
    if not text and not task:
        raise OptionError("nothing to measure: give --text FILE or --task TASK")
    if against and not text:
        raise OptionError("--against compares on text: give --text FILE as well")
    if efficiency and not text:
        raise OptionError("--efficiency runs the model on text: give --text FILE as well")
    from moekit.checkpoint import Checkpoint
    from moekit.lab import TASKS
    from moekit.lab import task as known
    from moekit.measure import bits_per_byte, compare, exact_match, together, windows
    from moekit.profile import read_texts
    from moekit.stream import open_model
    from moekit.systems import flat

    names = list(TASKS) if task == ["all"] else task
    for name in names:
        known(name)
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.tokenizer()
    texts = read_texts(text, tokenizer) if text else {}
    runner = _show.Watched(open_model(checkpoint, **asdict(machine)), f"run {model}")
    found: dict[str, Any] = {"model": model, "bits_per_byte": {}, "exact_match": {}}
    if texts:
        found["bits_per_byte"] = bits_per_byte(runner, texts, tokenizer, length=length)
    found["exact_match"] = {name: exact_match(runner, tokenizer, _examples(name, examples)) for name in names}
    if against:
        reference = runner.beside(open_model(against, **asdict(machine)))
        cut = together({domain: windows(lines, tokenizer, length=length) for domain, lines in texts.items()})
        found |= {"against": against, "divergence": compare(reference, runner, cut).as_dict()}
    if efficiency:
        found["efficiency"] = _efficiency(runner, reference if against else None, texts, tokenizer, length, found)
    if as_json:
        scores = ("bits_per_byte", "exact_match")
        _show.emit(found | {key: {name: vars(value) for name, value in found[key].items()} for key in scores})
        return
    rows = [(f"bits per byte, {name}", str(value)) for name, value in found["bits_per_byte"].items()]
    rows += [(f"exact match, {name}", str(value)) for name, value in found["exact_match"].items()]
    if against:
        rows += [(f"{name}, against {against}", value) for name, value in _receipt.divergence(found["divergence"])]
    if efficiency:
        rows += list(flat(found["efficiency"]).items())
    _show.table((model, "mean [95 % interval]"), rows)
    if against:
        _receipt.domains(found["divergence"])


def _efficiency(runner: Any, reference: Any, texts: Any, tokenizer: Any, length: int, found: dict[str, Any]) -> Any:
    """The report on the text's windows; with a reference, what was kept of its performance per byte."""
    from moekit.measure import together, windows
    from moekit.measure.efficientllm import efficiency_report, tensor_bytes

    work = together({domain: windows(lines, tokenizer, length=length) for domain, lines in texts.items()}).batches
    kept = None
    if reference is not None:
        both = (1 / found["divergence"][f"bits_per_byte_{which}"] for which in ("source", "output"))
        kept = (float(tensor_bytes(reference.model)), *both)
    return efficiency_report(runner, work, reference=kept).as_dict()


def _examples(name: str, count: int) -> list[tuple[str, str]]:
    from moekit.lab import examples

    return examples(name, "test", count)
