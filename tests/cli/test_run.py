"""`moekit run` says what the resident model says, under a cap, and what it took."""

import importlib
import io
import json

import pytest
import torch
from commanding import call

from moekit.checkpoint import Checkpoint
from moekit.stream import LoadedModel


def resident(prompt, new_tokens):
    checkpoint = Checkpoint.open("moekit:mini")
    model, tokenizer = LoadedModel.load(checkpoint).model, checkpoint.tokenizer()
    model.set_experts_implementation("moekit")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_it_says_what_the_resident_model_says(monkeypatch):
    expected = resident("def add(a, b):", 20)
    assert call("run", "moekit:mini", "def add(a, b):", "--new-tokens", 20)[:2] == (0, expected + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("def add(a, b):"))
    assert call("run", "moekit:mini", "-", "--new-tokens", 20)[:2] == (0, expected + "\n")


def test_explain_names_the_bounds_on_standard_error():
    code, _, err = call("run", "moekit:mini", "x = 1", "--new-tokens", 6, "--explain")
    assert code == 0
    for what in ("tokens/s", "hit rate", "of Belady's", "read from disk", "a token", "stalled", "peak memory"):
        assert what in err


def test_json_holds_the_text_and_the_figures():
    code, out, _ = call("run", "moekit:mini", "x = 1", "--new-tokens", 6, "--json", "--policy", "lfu")
    found = json.loads(out)
    assert code == 0
    assert found["text"] == resident("x = 1", 6)
    assert found["counters"]["requests"] > 0


def test_bad_input(refused):
    refused("run", "moekit:mini", "x", "--memory", "60MB", naming="the smallest cap that works is")
    refused("run", "moekit:mini", "x", "--policy", "best", naming="unknown cache policy 'best'")
    refused("run", "moekit:mini", "x", "--chat", naming="no chat template")
    refused("run", "moekit:dense", "x", naming="dense model")
    refused("run", "moekit:mini", "x", "--device-memory", "1GB", naming="name it with --device cuda")
    refused("run", "moekit:mini", "x", "--device", "tpu", naming="unknown device 'tpu'")


def test_a_device_of_its_own_is_explained_apart(monkeypatch):
    opening = importlib.import_module("moekit.run.paging")
    monkeypatch.setattr(opening, "pick_device", lambda name: torch.device("cpu:0"))  # stands for the device
    monkeypatch.setattr(opening.Away, "room", lambda away, working: 10**6)
    code, out, err = call("run", "moekit:mini", "x = 1", "--new-tokens", 6, "--explain", "--device", "cuda")
    assert (code, out) == (0, resident("x = 1", 6) + "\n")
    assert "read from memory" in err
    assert "read from disk" in err


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    """The tiny model packed in 2 bits."""
    folder = tmp_path_factory.mktemp("packed")
    assert call("plan", model, "--with", "rtn:bits=2", "--output", folder / "plan.json")[0] == 0
    assert call("apply", model, folder / "plan.json", "--format", "moekit", "--output", folder / "model")[0] == 0
    return folder / "model"


def test_stand_ins_are_said_not_to_be_exact_and_measured_when_asked(model, packed):
    asked = ("run", model, "abc", "--new-tokens", 5, "--stand-in", packed)
    code, out, err = call(*asked)
    assert code == 0
    assert err.startswith("not exact")
    assert "--explain measures what that changes" in err
    code, again, err = call(*asked, "--explain")
    assert (code, again) == (0, out)
    assert "nats a token from the exact model" in err
    assert "hit rate" in err


def test_json_says_whether_it_is_exact(model, packed):
    asked = ("run", model, "abc", "--new-tokens", 5, "--json")
    assert json.loads(call(*asked)[1])["exact"] is True
    found = json.loads(call(*asked, "--stand-in", packed, "--read", "hobbit:high=0.0,low=1.0", "--explain")[1])
    assert found["exact"] is False
    assert found["uses"]["read as copies"] > 0
    assert found["divergence"]["kl"] > 0
    assert found["divergence"]["tokens"] == 5
    # measuring is not counted
    plain = json.loads(call(*asked, "--stand-in", packed, "--read", "hobbit:high=0.0,low=1.0")[1])
    assert (plain["uses"], plain["divergence"]) == (found["uses"], None)


def test_bad_stand_ins(refused, model, packed, tmp_path):
    for command in (("run", model, "x"), ("serve", model)):
        refused(*command, "--read", "hobbit", naming="give them with --stand-in DIR")
        refused(*command, "--stand-in", packed, "--read", "hobit", naming="did you mean 'hobbit'?")
        refused(*command, "--stand-in", packed, "--read", "hobbit:high=2.0", naming="expected 0 <= high <= low <= 1")
    refused("run", model, "x", "--stand-in", model, naming="no plan.json that says what it was made of")
    refused("run", model, "x", "--stand-in", packed, "--ahead", 2, naming="nothing read ahead")


def test_the_task_of_a_prompt_is_found(refused, model, text, tmp_path):
    stored = tmp_path / "tasks.patterns"
    assert call("patterns", model, "--text", f"sums={text}", "--output", stored)[0] == 0
    code, out, err = call("run", model, "12 + 3", "--new-tokens", 5, "--patterns", stored, "--explain")
    assert (code, out) == (0, call("run", model, "12 + 3", "--new-tokens", 5)[1])
    assert "task                  sums\n" in err
    assert json.loads(call("run", model, "1", "--new-tokens", 2, "--patterns", stored, "--json")[1])["task"] == "sums"
    refused("run", "moekit:mini", "x", "--patterns", stored, naming="the patterns are of another model")
