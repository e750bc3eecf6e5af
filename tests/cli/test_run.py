"""`moekit run` says what the resident model says, under a cap, and what it took."""

import io
import json

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
