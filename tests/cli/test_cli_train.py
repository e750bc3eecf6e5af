"""`moekit train` and `moekit export`, and what the other commands make of a model that was trained so."""

import json
import sys

import pytest
import torch
from commanding import call

from moekit.lab import league
from moekit.lab.experiments._league import DOMAINS
from moekit.train.recipe import Recipe

RECIPE = """
[model]
vocab_size = 264
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
max_position_embeddings = 128
qk_norm = {qk_norm}
{more}

[train]
steps = 2
batch = 2
length = 32
"""


@pytest.fixture
def recipe(tmp_path):
    def write(qk_norm="true", more=""):
        path = tmp_path / "tiny.toml"
        path.write_text(RECIPE.format(qk_norm=qk_norm, more=more))
        return path

    return write


def test_train_writes_a_model_with_its_course(recipe, text, tmp_path):
    code, out, err = call("train", recipe(), "--text", text, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["steps"] == 2
    assert found["cross_entropy"] > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "recipe.json", "tokenizer.json"} <= names
    assert err == ""
    told = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert len(told["data"]) == len(told["tokenizer"]) == 64
    code, out, _ = call("inspect", tmp_path / "out", "--json")
    assert code == 0
    code, _, err = call("train", recipe(), "--text", text, "--output", tmp_path / "out")
    assert code == 2
    assert "exists: choose another folder" in err


def test_export_writes_the_stock_family(recipe, text, tmp_path):
    assert call("train", recipe(), "--text", text, "--output", tmp_path / "own")[0] == 0
    code, out, err = call("export", tmp_path / "own", "--output", tmp_path / "stock")
    assert code == 0, err
    assert "qwen3_moe" in out
    code, _, err = call("export", tmp_path / "stock", "--output", tmp_path / "again")
    assert code == 2
    assert "is a stock qwen3_moe checkpoint already" in err


@pytest.mark.parametrize(
    "more",
    [
        "",
        'wiring = "momentum"',
        "shared_expert_intermediate_size = 16",
        'router = {activation = "sigmoid"}\ncorrection = {}',
        'router = {select = {kind = "top-p", p = 0.5}}',
        'router = {select = {kind = "grouped", groups = 2}}',
    ],
)
def test_the_other_commands_work_on_it(recipe, text, tmp_path, more):
    assert call("train", recipe(more=more), "--text", text, "--output", tmp_path / "own")[0] == 0
    given = ("--with", "frequency:keep=0.5", "--text", text, "--max-tokens", 256)
    code, _, err = call("compress", tmp_path / "own", *given, "--output", tmp_path / "half")
    assert code == 0, err
    code, out, err = call("verify", tmp_path / "half", "--against", tmp_path / "own")
    assert code == 0, out + err
    assert json.loads(call("inspect", tmp_path / "half", "--json")[1])["experts"] == [2]


def test_the_house_recipe_is_the_default(text, tmp_path):
    assert call("train", "--text", text, "--steps", 1, "--output", tmp_path / "out")[0] == 0
    told = json.loads((tmp_path / "out" / "recipe.json").read_text())["model"]
    weights = {"kind": "softmax", "weights": Recipe.read("moduleformer").model["attention"]["weights"]}
    wiring = Recipe.read("momentum-smoe").model["wiring"]
    assert told == {**Recipe.read("base").model, "attention": weights, "wiring": wiring}


def test_bad_recipes_are_one_line(text, tmp_path):
    code, _, err = call("train", "no-such-recipe", "--text", text, "--output", tmp_path / "out")
    assert code == 2
    assert err.count("\n") <= 3
    assert "there is no recipe" in err
    assert not list(tmp_path.glob(".out*"))


def test_what_cannot_be_trained_is_one_line(recipe, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe().write_text(recipe().read_text().replace("264", "100\npad_token_id = 0"))
    for more, said in (([], "the tokenizer has 259 tokens: give"), (["--device", "cuda"], "device cuda was asked for")):
        code, _, err = call("train", tmp_path / "tiny.toml", "--text", text, "--output", tmp_path / "out", *more)
        assert code == 2
        assert said in err
        assert err.count("\n") == 1
    assert not list(tmp_path.glob(".out*"))


def test_layers_that_are_run_again_learn_the_same(recipe, text, tmp_path):
    losses = []
    for name, more in (("kept", []), ("again", ["--recompute"])):
        assert call("train", recipe(), "--text", text, "--output", tmp_path / name, "--device", "cpu", *more)[0] == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["cross_entropy"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_of_several_processes_the_first_reports(recipe, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["moekit.cli.train"], "leads", lambda: False)
    code, out, _ = call("train", recipe(), "--text", text, "--output", tmp_path / "out", "--device", "cpu", "--json")
    assert (code, out) == (0, "")


def test_steps_and_seed_replace_the_recipes(recipe, text, tmp_path):
    given = ("--text", text, "--steps", 1, "--seed", 3, "--tokenizer", "moekit:mini")
    assert call("train", recipe(), *given, "--output", tmp_path / "out")[0] == 0
    told = json.loads((tmp_path / "out" / "recipe.json").read_text())["train"]
    assert (told["steps"], told["seed"]) == (1, 3)
    code, out, _ = call("export", tmp_path / "out", "--output", tmp_path / "stock", "--json")
    assert code == 0
    assert json.loads(out)["family"] == "qwen3_moe"


def test_league_writes_its_document(tmp_path, monkeypatch):
    told = {"bits_per_byte": 2.0, "bits": dict.fromkeys(DOMAINS, 2.0), "total": 10, "active": 5, "max_violation": 0.1}
    told |= {"specialisation": 0.2, "active_in_training": 5}
    better = told | {"bits_per_byte": 1.5}
    monkeypatch.setattr(league, "play", lambda recipe, seed: better if "wiring" in recipe.model else told)
    monkeypatch.setattr(league, "paces", lambda entered, turn: [dict.fromkeys(entered, 1.0)])
    code, out, err = call("league", "--with", "momentum-smoe", "--output", tmp_path / "table.md", "--json")
    assert code == 0, err
    assert [row["recipe"] for row in json.loads(out)] == ["momentum-smoe", "base"]
    page = (tmp_path / "table.md").read_text()
    assert "moekit league --with momentum-smoe --seeds 11,12,13" in page
    assert (tmp_path / "table.png").is_file()
    for wrong in (("--output", tmp_path / "table.txt"), ("--with", "nothing"), ("--seeds", "3")):
        assert call("league", *wrong)[0] == 2
