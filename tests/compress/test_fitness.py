"""Tasks as a fitness: the share of wrong answers under a plan, and files of prompts and answers."""

from __future__ import annotations

import json

import pytest
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._fitness import TaskError, read_examples
from moekit.errors import TextError
from moekit.measure import exact_match
from moekit.plan import Plan
from moekit.stream import LoadedModel


def test_errors_under_a_plan_and_the_model_as_it_was() -> None:
    source = Checkpoint.open("moekit:mini")
    runner, tokenizer = LoadedModel.load(source, dtype=torch.float32), source.tokenizer()
    examples = lab.examples("arithmetic", "calibration", 12, 0)
    right = exact_match(runner, tokenizer, examples).mean
    error = TaskError(runner, source, tokenizer, examples)
    before = next(iter(runner.forward([{"input_ids": torch.arange(30)[None]}])))
    assert right > 0
    assert error(Plan(source=source.fingerprint, layers={})) == 1.0 - right
    assert error(method("random:keep=4").plan(None, source)) == 1.0
    assert torch.equal(next(iter(runner.forward([{"input_ids": torch.arange(30)[None]}]))), before)


def test_a_file_of_examples(tmp_path) -> None:
    path = tmp_path / "task.jsonl"
    pairs = [("1+1=", "2"), ("a\nb", "c")]
    path.write_text("\n\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in pairs) + "\n")
    assert read_examples(path) == pairs


WRONG = {
    '{"prompt": "1+1="}': r"line 1: expected .*, found '\{\"prompt\": \"1\+1=\"\}'",
    '{"prompt": "1+1=", "answer": 2}': "line 1: expected",
    '{"prompt": "1+1=", "answer": ""}': "line 1: expected",
    "not json": "line 1: expected .* found 'not json'",
    "[1, 2]": "line 1: expected",
    "": "has no examples",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_file_of_something_else_is_one_clear_line(text: str, tmp_path) -> None:
    (tmp_path / "task.jsonl").write_text(text)
    with pytest.raises(TextError, match=WRONG[text]):
        read_examples(tmp_path / "task.jsonl")


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(TextError, match=r"cannot read the task .*nothing: No such file"):
        read_examples(tmp_path / "nothing")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match="it is not UTF-8"):
        read_examples(tmp_path / "latin")
