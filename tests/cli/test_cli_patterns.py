"""Patterns of tasks from the command line: stored, found again by a prompt, and planned by."""

import json

import numpy as np
import pytest
from commanding import call

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress.premoe import Patterns, marker
from moekit.plan import Plan
from moekit.profile import Profile
from moekit.stream import StreamedModel

TASKS = ("sorting", "brackets", "arithmetic")
NEEDED = "counts,tokens,strong_logit,probability,gate_norm"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        (folder / f"{task}.txt").write_text(lab.text(task, "calibration", 1500))
    return folder


@pytest.fixture(scope="module")
def stored(model, texts):
    given = [part for task in TASKS for part in ("--text", f"{task}={texts / task}.txt")]
    code, out, err = call("patterns", model, *given, "--output", texts / "tasks.patterns", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [task["task"] for task in found["tasks"]] == list(TASKS)
    assert (found["layers"], found["bytes"]) == (2, (texts / "tasks.patterns").stat().st_size)
    return texts / "tasks.patterns"


def test_a_prompt_finds_its_task_and_the_plan_keeps_its_experts(model, texts, stored, tmp_path):
    for task in TASKS:
        plan = tmp_path / f"{task}.json"
        prompt = (texts / f"{task}.txt").read_text()[:400]
        code, out, err = call("retrieve", model, stored, "--prompt", prompt, "--keep", "3", "--output", plan, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["task"], found["output"]) == (task, str(plan))
        assert found["margin"] > 0
        assert found["bytes_planned"] < found["bytes"]
        kept = {name: sorted(layer.sources) for name, layer in Plan.load(plan).layers.items()}
        assert kept == {name: list(ids) for name, ids in Patterns.load(stored).experts(task, 3).items()}


def test_a_named_task_needs_no_model_run_and_apply_carries_it_out(model, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.cli.retrieve._match", lambda *_: pytest.fail("the model was run"))
    plan = tmp_path / "p.json"
    code, out, err = call("retrieve", model, stored, "--task", "brackets", "--keep", "0.25", "--output", plan)
    assert (code, err) == (0, "")
    assert out.startswith("task: brackets\n")
    assert call("apply", model, plan, "--output", tmp_path / "out")[0] == 0
    assert Checkpoint.open(tmp_path / "out").moe_layers[0].num_experts == 2


def test_a_profile_stores_what_the_method_plans(model, texts, tmp_path):
    given = [part for task in TASKS for part in ("--text", f"{task}={texts / task}.txt")]
    seen = tmp_path / "seen.profile"
    assert call("profile", model, *given, "--statistics", NEEDED, "--output", seen)[0] == 0
    code, out, err = call("patterns", model, "--profile", seen, "--output", tmp_path / "p")
    assert (code, err) == (0, "")
    assert "nearest other" in out
    source = Checkpoint.open(model)
    ours = Patterns.load(tmp_path / "p").plan("sorting", 3, source)
    theirs = method("premoe:keep=3,domains=sorting").plan(Profile.load(seen), source)
    assert {n: layer.sources for n, layer in ours.layers.items()} == {n: x.sources for n, x in theirs.layers.items()}


def test_a_query_reads_no_further_than_the_first_layers():
    source = Checkpoint.open("moekit:mini")
    found = marker(StreamedModel(source), [np.arange(40)])
    assert found.any()
    assert source.counted_bytes < 0.5 * sum(info.nbytes for info in source.tensors.values())


@pytest.mark.parametrize(
    ("more", "naming"),
    [
        ([], "give either --prompt TEXT or --task NAME (neither is given)"),
        (["--prompt", "a", "--task", "sorting"], "give either --prompt TEXT or --task NAME (both are given)"),
        (["--task", "chess"], "no pattern for the task 'chess': there are sorting, brackets, arithmetic"),
        (["--task", "sorting", "--keep", "half"], "--keep half is no share, such as 0.5, and no number of experts"),
        (["--prompt", ""], "a query needs two tokens or more"),
        (["--task", "sorting", "--keep", "1"], "fewer than the top-k of 2"),
    ],
)
def test_what_is_refused(refused, model, stored, more, naming):
    refused("retrieve", model, stored, *more, naming=naming)


def test_patterns_of_another_model(refused, stored, model, text, tmp_path):
    refused("retrieve", "moekit:mini", stored, "--task", "sorting", naming="the patterns are of another model")
    refused("retrieve", model, text, "--task", "sorting", naming="cannot be read")
    refused("patterns", model, "--output", tmp_path / "p", naming="give either --profile FILE or --text FILE")
    refused("patterns", model, "--text", text, "--output", stored, naming="exists: choose another")


def test_one_task_alone_has_no_neighbour(model, text, tmp_path):
    code, out, _ = call("patterns", model, "--text", f"one={text}", "--output", tmp_path / "p", "--json")
    assert code == 0
    assert json.loads(out)["tasks"] == [{"task": "one", "nearest": None, "distance": None}]
