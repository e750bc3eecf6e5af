"""The commands `build` and `recover` and the option `eval --efficiency`, in this process."""

import contextlib
import io
import json

import pytest
from building import dense

from moekit import lab
from moekit.cli import main
from moekit.lab._tokens import byte_tokenizer


def call(*arguments):
    """(exit code, standard output, standard error) of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model with a tokenizer, text, and pairs of answers."""
    folder = tmp_path_factory.mktemp("commands")
    dense().save_pretrained(folder / "dense")
    byte_tokenizer(128).save_pretrained(folder / "dense")
    (folder / "notes.txt").write_text(lab.text("arithmetic", "calibration", 1500))
    pairs = [{"prompt": f"add: {i}+1=", "chosen": f"{i + 1}", "rejected": "0"} for i in range(1, 7)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def test_build_recover_and_the_report(place, tmp_path):
    out, back = tmp_path / "sparse", tmp_path / "back"
    method = "llava-mod:dense_steps=1,sparse_steps=1,preference_steps=1"
    few = ("--text", place / "notes.txt", "--length", 32, "--batch", 2)
    code, text, err = call(
        "build", place / "dense", "--with", method, *few, "--pairs", place / "pairs.jsonl", "--output", out, "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(text)["format"] == "stock"
    code, text, err = call("recover", out, "--against", place / "dense", *few, "--steps", 2, "--output", back)
    assert (code, err) == (0, "")
    assert "training-free" in text
    assert "after 2 steps" in text
    found = json.loads((back / "recovery.json").read_text())
    assert (found["trained"], found["steps"]) == (["router"], 2)
    code, text, err = call(
        "eval", back, "--text", place / "notes.txt", "--efficiency", "--against", out, "--length", 64, "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(text)["efficiency"]
    assert report["PCU"] == "not measured"
    assert report["MCR"] == pytest.approx(1.0, rel=0.05)
    assert report["parameters_active"] < report["parameters_total"]


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (("build", "dense", "--with", "upcycle", "--output", "x"), "unknown builder 'upcycle'"),
        (("build", "dense", "--with", "llava-mod", "--output", "x"), "llava-mod trains on text: give --text"),
        (("build", "dense", "--with", "llava-mod", "--output", "dense"), "exists: choose another folder"),
        (("recover", "dense", "--against", "dense", "--output", "x"), "recovery trains on text"),
        (
            ("build", "dense", "--with", "llava-mod", "--text", "notes.txt", "--device", "tpu", "--output", "x"),
            "unknown device 'tpu': use auto, cpu or cuda",
        ),
        (("eval", "dense", "--efficiency", "--task", "facts"), "--efficiency runs the model on text"),
        (("build", "dense", "--with", "llava-mod", "--pairs", "notes.txt", "--output", "x"), "line 1: expected JSON"),
        (("build", "dense", "--with", "llava-mod", "--pairs", "none", "--output", "x"), "cannot be read"),
    ],
)
def test_bad_input_is_one_line(place, monkeypatch, arguments, naming):
    monkeypatch.chdir(place)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert naming in err
    assert err.startswith("moekit: ")
    assert err.count("\n") == 1
    assert not (place / "x").exists()
