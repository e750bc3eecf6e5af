"""Tasks as a fitness: the share of wrong answers under a plan, and files of prompts and answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._fitness import TaskError, read_examples, task_error
from moekit.errors import OptionError, TextError
from moekit.measure import exact_match
from moekit.plan import Plan
from moekit.stream import LoadedModel, StreamedModel


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


def test_a_streamed_model_makes_the_same_errors() -> None:
    source = Checkpoint.open("moekit:mini")
    examples = lab.examples("sorting", "calibration", 12, 0)
    plans = [Plan(source=source.fingerprint, layers={}), method("random:keep=12").plan(None, source)]
    loaded, streamed = (
        TaskError(runner, source, source.tokenizer(), examples)
        for runner in (LoadedModel.load(source, dtype=torch.float32), StreamedModel(source, dtype=torch.float32))
    )
    found = [loaded(plan) for plan in plans]
    assert found[0] < found[1]
    assert [streamed(plan) for plan in plans] == found
    assert (loaded.reads_disk, streamed.reads_disk) == (False, True)


def test_packed_experts_cannot_be_tried_on() -> None:
    packed = SimpleNamespace(path="out", scheme=SimpleNamespace(config={"quant_method": "moekit"}))
    with pytest.raises(OptionError, match="out has packed experts, which no plan can be tried on: search on its sour"):
        task_error(packed, [("1+1=", "2")])  # type: ignore[arg-type]


def test_a_file_of_examples(tmp_path) -> None:
    path = tmp_path / "task.jsonl"
    pairs = [("1+1=", "2"), ("a\nb", "c")]
    path.write_text("\n\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in pairs) + "\n")
    assert read_examples(path) == pairs


WRONG = {
    '{"prompt": "1+1="}': r"line 1: expected JSON with the texts prompt, answer, found '\{\"prompt\": \"1\+1=\"\}'",
    '{"prompt": "1+1=", "answer": 2}': "line 1: expected",
    '{"prompt": "1+1=", "answer": ""}': "line 1: expected",
    "not json": "line 1: expected .* found 'not json'",
    "[1, 2]": "line 1: expected",
    "": "holds no record: give lines of JSON with the texts prompt, answer",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_file_of_something_else_is_one_clear_line(text: str, tmp_path) -> None:
    (tmp_path / "task.jsonl").write_text(text)
    with pytest.raises(TextError, match=WRONG[text]):
        read_examples(tmp_path / "task.jsonl")


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(TextError, match=r"nothing cannot be read: No such file"):
        read_examples(tmp_path / "nothing")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match="it is not UTF-8"):
        read_examples(tmp_path / "latin")
