"""Every command does what it says: for people a table, for programs one JSON document, with the same figures."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from commanding import call, make_model, tree
from safetensors.torch import load_file, save_file

from moekit.cli._app import COMMANDS
from moekit.errors import MoekitError


def parsed(*arguments):
    code, out, err = call(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"Examples?:\n +moekit {name} ", out)


def test_commands_of_the_issue_are_there():
    asked = "inspect profile plan fit apply compress patterns retrieve recover build compare verify eval systems"
    asked += " reproduce demo train league export"
    assert set(asked.split()) <= set(COMMANDS)
    ends = [name for name in COMMANDS if name != "serve"]  # which reports nothing, and answers until it is stopped
    assert all("--json" in call(name, "--help")[1] for name in ends)


HELP = """
import sys
from moekit.cli import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""


def test_help_needs_no_heavy_import():
    """The list of commands appears before torch would have been loaded."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "reproduce" in done.stdout


def test_no_command_shows_the_list():
    assert call()[1] == call("--help")[1]


def test_inspect(model):
    found = parsed("inspect", model)
    tensors = load_file(model / "model.safetensors")
    total = sum(t.numel() for t in tensors.values())
    one = 3 * 32 * 64
    assert (found["layers"], found["experts"], found["top_k"]) == (2, [8], [2])
    assert found["parameters"]["total"] == total
    assert found["parameters"]["active"] == total - 2 * 6 * one
    assert found["parameters"]["by_part"]["experts"] == 2 * 8 * one
    assert found["bytes"]["total"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert found["sizes"]["half of the experts"] == found["bytes"]["total"] - found["bytes"]["by_part"]["experts"] // 2
    assert found["memory"]["whole"] == found["bytes"]["total"] + found["memory"]["cache"]
    assert "profile" in found["can"]
    shown = call("inspect", model)[1]
    assert "8, top-2" in shown
    assert "total" in shown


def test_inspect_reads_headers_only(model, tmp_path):
    """Every byte of the weights is garbage, and inspect does not notice."""
    copy = make_model(tmp_path / "copy")
    path = copy / "model.safetensors"
    raw = path.read_bytes()
    head = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:head] + b"\xff" * (len(raw) - head))
    assert parsed("inspect", copy)["parameters"] == parsed("inspect", model)["parameters"]


def test_profile_writes_file_and_report(model, text, tmp_path):
    output, report = tmp_path / "p.profile", tmp_path / "p.html"
    arguments = ("profile", model, "--text", f"a={text}", "--text", f"b={text}", "--max-tokens", "2000")
    found = parsed(*arguments, "--output", output, "--report", report)
    assert found["domains"] == ["a", "b"]
    assert found["tokens"] <= 2000
    assert output.is_file()
    assert "<html" in report.read_text()
    code, out, _ = call(*arguments, "--output", output, "--report", report, "--overwrite")
    assert code == 0
    assert "model.layers.1.mlp" in out


@pytest.fixture
def half(model, profile, tmp_path):
    plan = tmp_path / "half.json"
    found = parsed("plan", model, "--with", "reap:keep=0.5", "--profile", profile, "--output", plan)
    assert [layer["stored"] for layer in found["layers"]] == [4, 4]
    output = tmp_path / "half"
    receipt = parsed("apply", model, plan, "--output", output, "--profile", profile)
    assert receipt["divergence"]["kl"] > 0
    return output


def test_plan_apply_verify(half, model, text):
    assert parsed("inspect", half)["experts"] == [4]
    report = parsed("verify", half, "--against", model, "--text", text)
    assert report["ok"]
    assert report["divergence"]["tokens"] > 0
    code, out, err = call("verify", half, "--against", model)
    assert (code, err) == (0, "")
    assert "equal" in out


def test_verify_says_no_with_exit_code_1(half, model):
    path = half / "model.safetensors"
    if not path.exists():
        path = next(half.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if "gate.weight" in name)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    code, out, _ = call("verify", half, "--against", model)
    assert code == 1
    assert name in out
    code, out, _ = call("verify", half, "--against", model, "--json")
    assert code == 1
    assert not json.loads(out)["ok"]


def test_compress_equals_plan_and_apply(half, model, profile, tmp_path):
    output = tmp_path / "compressed"
    code, out, err = call("compress", model, "--with", "reap:keep=0.5", "--profile", profile, "--output", output)
    assert (code, err) == (0, "")
    assert "KL divergence" in out
    assert "without training afterwards: moekit recover OUTPUT --against tiny --text FILE --output NEW" in out
    files = {p.name: p.read_bytes() for p in half.glob("*.safetensors")}
    assert files == {p.name: p.read_bytes() for p in output.glob("*.safetensors")}


def test_compress_without_text_for_a_method_that_needs_none(model, tmp_path):
    receipt = parsed("compress", model, "--with", "rtn:bits=8", "--output", tmp_path / "out")
    assert receipt["divergence"] is None
    assert receipt["nbytes"]["after"] < receipt["nbytes"]["before"]


def test_overwrite_replaces(half, model, profile):
    receipt = parsed(
        "compress", model, "--with", "random:keep=4", "--profile", profile, "--output", half, "--overwrite"
    )
    assert receipt["plan"]["methods"] == ["random:keep=4,seed=0"]


def test_fit_dry_run_writes_nothing_and_fit_keeps_its_word(model, profile, tmp_path):
    before = tree(tmp_path)
    budget = ("fit", model, "--ratio", "0.4", "--profile", profile)
    seen = parsed(*budget, "--dry-run")
    assert tree(tmp_path) == before
    assert seen["receipt"] is None
    curve = tmp_path / "curve.html"
    done = parsed(*budget, "--output", tmp_path / "out", "--curve", curve)
    assert done["bytes"] == seen["bytes"] <= done["budget"]["bytes"]
    weights = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert weights == done["bytes"]
    assert done["measured"] == done["receipt"]["divergence"]["kl"]
    assert done["levers"]
    assert "<svg" in curve.read_text()
    code, out, err = call(*budget, "--dry-run")
    assert (code, err) == (0, "")
    assert "Budget" in out


def test_eval(model, text):
    found = parsed("eval", model, "--text", f"sums={text}", "--task", "sorting", "--examples", "5", "--against", model)
    score = found["bits_per_byte"]["sums"]
    assert score["low"] <= score["mean"] <= score["high"]
    assert 4 < score["mean"] < 12  # a random model over 264 tokens says about log2(264) bits
    assert found["exact_match"]["sorting"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert found["divergence"]["kl"] == 0.0
    assert "bits per byte, sums" in call("eval", model, "--text", f"sums={text}")[1]


def test_divergence_is_shown_by_domain(half, model, text):
    texts = ("--text", f"sums={text}", "--text", f"again={text}")
    found = parsed("eval", half, *texts, "--against", model)["divergence"]
    assert found["domains"]["sums"] == found["domains"]["again"]
    assert found["domains"]["sums"]["tokens"] * 2 == found["tokens"]
    assert parsed("verify", half, "--against", model, *texts)["divergence"]["domains"].keys() == {"sums", "again"}
    for command in (("eval", half, *texts, "--against", model), ("verify", half, "--against", model, *texts)):
        shown = call(*command)[1]
        rows = [line for line in shown.splitlines() if line.startswith(("sums ", "again "))]
        assert len(rows) == 2
        assert all(re.search(r"\d \[[\d.e-]+, [\d.e-]+\]", row) and "% [" in row and " -> " in row for row in rows)


def test_systems():
    rows = parsed("systems")
    assert len(rows) == 182
    assert set(rows[0]) >= {"n", "key", "title", "wing", "where", "outcome", "figures"}
    assert [row["key"] for row in parsed("systems", "17")] == ["easy-ep"]
    assert {row["wing"] for row in parsed("systems", "--wing", "steer")} == {"steer"}
    assert "EASY-EP" in call("systems", "easy-ep")[1]
    assert "planned" in call("systems")[1]
    merging = parsed("systems", "expert", "merging")
    assert len(merging) > 1
    assert {row["key"] for row in parsed("systems", "expert", "merging", "--wing", "compress")} < {
        row["key"] for row in rows
    }
    assert all(row["title"] in call("systems", "expert", "merging")[1] for row in merging)
    assert "arXiv id" in call("systems", "1701.00001")[2]


def test_reproduce_shows_the_experiment_s_result(monkeypatch):
    calls = []

    def run(key, seeds, text, advance):
        calls.append((key, seeds, text))
        return {"key": key, "verdict": "not-shown", "figures": {"half": {"mean": 0.25}}, "seeds": list(seeds)}

    monkeypatch.setattr("moekit.lab.experiments.run", run)
    found = parsed("reproduce", "easy-ep", "--seeds", "1,2")
    assert found == {"key": "easy-ep", "verdict": "not-shown", "figures": {"half": {"mean": 0.25}}, "seeds": [1, 2]}
    assert "half.mean" in call("reproduce", "easy-ep")[1]
    assert calls == [("easy-ep", (1, 2), None), ("easy-ep", (11, 12, 13), None)]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MoekitError("one thing\nand another"), 2, "moekit: one thing and another\n"),
        (KeyboardInterrupt(), 130, "moekit: interrupted"),
        (OSError(28, "No space left on device", "/disk"), 2, "moekit: /disk: No space left on device"),
    ],
)
def test_what_becomes_of_errors(monkeypatch, error, code, said):
    def fail(wing):
        raise error

    monkeypatch.setattr("moekit.systems.records", fail)
    found, out, err = call("systems")
    assert (found, out) == (code, "")
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_what_is_no_user_error_keeps_its_traceback(monkeypatch):
    def fail(wing):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moekit.systems.records", fail)
    with pytest.raises(OSError, match="Input/output"):
        call("systems")


def test_demo_goes_through_and_keeps_what_is_not_its_own(monkeypatch, model, tmp_path):
    """All its steps, on the tiny model and little text."""
    for name, value in {"MODEL": str(model), "CALIBRATION_BYTES": 600, "TEST_BYTES": 400, "EXAMPLES": 3}.items():
        monkeypatch.setattr(importlib.import_module("moekit.cli.demo"), name, value)
    output = tmp_path / "demo"
    code, out, err = call("demo", "--output", output, "--ratio", "0.4")
    assert (code, err) == (0, "")
    assert re.findall(r"== (\d)", out) == list("12345")
    assert f"report: {output / 'report.html'}" in out
    assert (output / "report.html").is_file()
    (output / "mine.txt").write_text("mine")
    found = parsed("demo", "--output", output, "--ratio", "0.4", "--overwrite")
    assert (output / "mine.txt").read_text() == "mine"
    assert set(found["before"]) == set(found["after"])
    assert found["receipt"]["nbytes"]["after"] <= 0.65 * found["receipt"]["nbytes"]["before"]
