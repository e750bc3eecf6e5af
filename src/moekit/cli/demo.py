"""`moekit demo`: the main job from end to end, on the model in the package."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _curve, _receipt, _show
from moekit.cli._options import Json, Machine, Overwrite, Written
from moekit.cli._work import carried_out, check_output
from moekit.cli.fit import prove, search
from moekit.cli.inspect import inspect

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile

MODEL = "moekit:mini"
CALIBRATION_BYTES, TEST_BYTES, EXAMPLES = 8_192, 8_192, 100


def demo(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for the profile, the report and the smaller model.")
    ],
    ratio: Annotated[float, typer.Option("--ratio", metavar="R", help="Share of the bytes to remove.")] = 0.5,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Inspect, profile, fit to half its size, verify and compare the model in the package: the whole job at a glance.

    \b
    Example:
      moekit demo --output out/demo
    """
    check_output(output, overwrite)
    with _show.silenced(as_json):
        found = run(output, ratio, overwrite)
    if as_json:
        _show.emit(found)


def run(output: Path, ratio: float, overwrite: bool) -> dict[str, Any]:
    """Every step in turn, shown as it goes; returns the receipt and the figures before and after."""
    from moekit.checkpoint import Checkpoint

    output.mkdir(parents=True, exist_ok=True)
    smaller, curve = output / "model", output / "curve.html"
    checkpoint, machine = Checkpoint.open(MODEL), Machine()
    _show.say("== 1. inspect ==", "")
    inspect(MODEL)
    _show.say("", "== 2. profile ==", "")
    seen = _profiled(checkpoint, output, overwrite)
    _show.say("", f"== 3. fit: remove {ratio:.0%} of its bytes ==", "")
    result, judge = search(checkpoint, seen, {"ratio": ratio}, machine)
    _curve.write(result.curve, result.nbytes, curve, f"{MODEL}: size against predicted loss")
    _show.say(result.describe(), "")
    _curve.show(result.curve, result.nbytes)
    _show.say("")
    receipt = carried_out(checkpoint, result.plan, smaller, judge, Written(overwrite=overwrite), machine, "apply")
    _receipt.show(receipt, smaller)
    _show.say("", "== 4. verify ==", "")
    tensors = prove(smaller, checkpoint, machine)
    _show.say(f"{tensors} tensors recomputed from source and plan: all equal")
    _show.say("", "== 5. before and after, on text and tasks that nothing was fitted to ==", "")
    before, after = measure(checkpoint), measure(Checkpoint.open(smaller))
    sizes = [_show.gigabytes(receipt.nbytes[key]) for key in ("before", "after")]
    rows = [(name, f"{value:.3f}", f"{after[name]:.3f}") for name, value in before.items()]
    _show.table(("", "before", "after"), [("size", *sizes), *rows])
    _show.say("", f"report: {output / 'report.html'}", f"curve: {curve}", f"model: {smaller}")
    return {"output": output, "receipt": _receipt.as_dict(receipt, smaller), "before": before, "after": after}


def _profiled(checkpoint: "Checkpoint", output: Path, overwrite: bool) -> "Profile":
    from moekit import lab
    from moekit.profile import profile

    texts = {domain: [lab.text(domain, "calibration", CALIBRATION_BYTES)] for domain in lab.DOMAINS}
    with _show.progress("profile") as advance:
        seen = profile(_in_memory(checkpoint), texts, progress=advance)
    seen.save(output / "mini.profile", overwrite=overwrite)
    seen.report(output / "report.html")
    for part in seen.tables():
        _show.table(part.columns, part.rows, part.title)
        _show.say("")
    return seen


def measure(checkpoint: "Checkpoint") -> dict[str, float]:
    """Bits per byte of each text domain and exact match of each task, on the test split."""
    from moekit import lab
    from moekit.measure import bits_per_byte, exact_match

    runner = _show.Watched(_in_memory(checkpoint), f"measure {checkpoint.path.name}")
    tokenizer = checkpoint.tokenizer()
    texts = {domain: [lab.text(domain, "test", TEST_BYTES)] for domain in lab.TEXTS}
    scores = {f"bits per byte, {d}": v.mean for d, v in bits_per_byte(runner, texts, tokenizer).items()}
    for task in lab.TASKS:
        answers = lab.examples(task, "test", EXAMPLES)
        scores[f"exact match, {task}"] = exact_match(runner, tokenizer, answers, batch_size=EXAMPLES).mean
    return scores


def _in_memory(checkpoint: "Checkpoint") -> Any:
    """The model in float32, which processors without bfloat16 units run about twice as fast."""
    import torch

    from moekit.stream import LoadedModel

    return LoadedModel.load(checkpoint, dtype=torch.float32)
