"""Searching by a task's wrong answers, from the command line."""

import json
import re

import pytest
from commanding import call

from moekit import lab
from moekit.plan import Plan
from moekit.plan.live import LiveLoss

EEP = "eep:fitness=error,keep=4,evaluations=5"


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.jsonl"
    pairs = lab.examples("sorting", "calibration", 4, 0)
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs))
    return path


def test_plans_are_measured_by_wrong_answers(model, task, tmp_path, monkeypatch):
    monkeypatch.setattr(LiveLoss, "__call__", lambda *_: pytest.fail("the divergence was asked for"))
    output = tmp_path / "eep.json"
    code, out, err = call("plan", model, "--with", EEP, "--task", task, "--output", output, "--json")
    assert (code, err) == (0, "")
    assert all("measured at 1 " in layer["why"] for layer in json.loads(out)["layers"])
    assert Plan.load(output).methods[0].startswith("eep:keep=4,evaluations=5")


def test_compress_by_a_task_measures_on_other_text(model, task, text, tmp_path):
    output = tmp_path / "out"
    arguments = ("--with", EEP, "--task", task, "--held-out", text, "--output", output, "--json")
    code, out, err = call("compress", model, *arguments)
    assert (code, err) == (0, "")
    assert json.loads(out)["divergence"]["tokens"] > 0


def test_a_search_has_a_bar(model, task, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("rich.progress.Progress.update", lambda self, task, **now: told.append(now))
    code, _, err = call("plan", model, "--with", EEP, "--task", task, "--output", tmp_path / "eep.json")
    assert (code, err) == (0, "")
    assert [(now["completed"], now["total"]) for now in told] == [(done + 1, 5) for done in range(5)]


@pytest.mark.parametrize(
    ("methods", "given", "naming"),
    [
        ([EEP], False, "fitness=error counts wrong answers: give --task FILE"),
        (["super-experts:planner=eep:fitness=error"], False, "fitness=error counts wrong answers: give --task FILE"),
        (["reap"], True, "--task is searched by methods that count wrong answers: say so, as in eep:fitness=error"),
        ([EEP, "eep:keep=4"], True, "--task is searched by methods that count wrong answers"),
    ],
)
def test_a_task_goes_with_methods_that_count_errors(refused, model, task, tmp_path, methods, given, naming):
    named = [part for method in methods for part in ("--with", method)]
    refused("plan", model, *named, *(["--task", task] if given else []), "--output", tmp_path / "p", naming=naming)


def test_a_task_that_is_none(refused, model, tmp_path, text):
    refused("plan", model, "--with", EEP, "--task", text, "--output", tmp_path / "p", naming="line 1: expected")
    assert re.search(r"--task FILE +JSONL of prompt, answer", call("compress", "--help")[1])
