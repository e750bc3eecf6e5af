"""`moekit demo`: the main job from end to end, on the model in the package."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _curve, _receipt, _show
from moekit.cli._options import Json, Overwrite
from moekit.cli._work import check_output
from moekit.cli.fit import search
from moekit.cli.inspect import inspect

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

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
    from moekit import lab
    from moekit.checkpoint import Checkpoint
    from moekit.plan import apply
    from moekit.plan.verify import verify
    from moekit.profile import profile

    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    checkpoint = Checkpoint.open(MODEL)
    _heading(as_json, "1. inspect")
    if not as_json:
        inspect(MODEL)
    _heading(as_json, "2. profile")
    texts = {domain: [lab.text(domain, "calibration", CALIBRATION_BYTES)] for domain in lab.DOMAINS}
    with _show.progress("profile") as advance:
        seen = profile(_in_memory(checkpoint), texts, progress=advance)
    seen.save(output / "mini.profile")
    seen.report(output / "report.html")
    if not as_json:
        for part in seen.tables():
            _show.table(part.columns, part.rows, part.title)
            _show.say("")
    _heading(as_json, f"3. fit: remove {ratio:.0%} of its bytes")
    result, judge = search(checkpoint, seen, {"ratio": ratio})
    _curve.write(result.curve, result.nbytes, output / "curve.html", f"{MODEL}: size against predicted loss")
    with _show.progress("apply") as advance:
        receipt = apply(checkpoint, result.plan, output / "model", text=judge, progress=advance)
    if not as_json:
        _show.say(result.describe(), "")
        _receipt.show(receipt, output / "model")
    _heading(as_json, "4. verify")
    with _show.progress("verify") as advance:
        report = verify(output / "model", checkpoint, progress=advance)
    report.require()
    if not as_json:
        _show.say(f"{report.tensors} tensors recomputed from source and plan: all equal")
    _heading(as_json, "5. before and after, on text and tasks that nothing was fitted to")
    before, after = measure(checkpoint), measure(Checkpoint.open(output / "model"))
    if as_json:
        _show.emit(
            {"output": output, "receipt": _receipt.as_dict(receipt, output / "model"), "before": before, "after": after}
        )
        return
    rows = [(name, f"{value:.3f}", f"{after[name]:.3f}") for name, value in before.items()]
    sizes = [_show.gigabytes(receipt.nbytes[key]) for key in ("before", "after")]
    _show.table(("", "before", "after"), [("size", *sizes), *rows])
    _show.say("", f"report: {output / 'report.html'}", f"curve: {output / 'curve.html'}", f"model: {output / 'model'}")


def _heading(silent: bool, title: str) -> None:
    if not silent:
        _show.say("", f"== {title} ==", "")


def measure(checkpoint: "Checkpoint") -> dict[str, float]:
    """Bits per byte of each text domain and exact match of each task, on the test split."""
    from moekit import lab
    from moekit.measure import bits_per_byte, exact_match

    runner = _in_memory(checkpoint)
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
