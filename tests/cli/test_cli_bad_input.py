"""Bad input gets one clear line on standard error and exit code 2; nothing is written, nothing is lost."""

import json
import resource
import shutil

import pytest
import torch
from commanding import call, make_model, tree
from safetensors.torch import load_file, save_file

from moekit.measure import Interval  # noqa: F401  (the rooms below load once, here)
from moekit.systems import records


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    return make_model(tmp_path / "sharded", shard="60KB")


def test_a_path_that_is_no_model(refused, tmp_path, text):
    refused("inspect", tmp_path / "nowhere", naming="does not exist")
    refused("inspect", tmp_path, naming="no config.json")
    refused("inspect", text, naming="is a file")
    refused("eval", "moekit:nothing", "--text", text, naming="moekit:nothing does not exist")


def test_a_dense_model(refused, tmp_path, text):
    dense = make_model(tmp_path / "dense", dense=True)
    refused("inspect", dense, naming="dense model")
    refused("fit", dense, "--ratio", "0.5", "--text", text, "--output", tmp_path / "out", naming="dense model")


def test_a_truncated_shard(refused, copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused("inspect", copy, naming="truncated")


def test_a_corrupt_shard(refused, copy):
    path = copy / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    refused("inspect", copy, naming="model.safetensors")


def test_a_missing_shard(refused, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused("inspect", sharded, naming=[shard.name, "missing"])


def test_an_index_that_names_absent_tensors(refused, sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.gate.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    refused("inspect", sharded, naming="model.layers.9.mlp.gate.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("mlp.experts.3.down_proj.weight", ["model.layers.1.mlp.experts.3.down_proj.weight"]),
        ("self_attn.q_proj.weight", ["model.layers.1.self_attn.q_proj.weight"]),
    ],
)
def test_weights_that_are_not_finite(copy, tmp_path, value, part, words):
    """Found where they are read: what was finished before that stays in the hidden folder, and no output appears."""
    tensors = load_file(copy / "model.safetensors")
    tensors[f"model.layers.1.{part}"].view(-1)[5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    code, out, err = call("compress", copy, "--with", "rtn:bits=8", "--output", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in [*words, "NaN" if value != value else "infinite"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "word"), [(b"", "empty"), (b"  \n", "empty"), (b"\xff\xfe\x00abc", "UTF-8")])
def test_text_that_is_none(refused, model, tmp_path, content, word):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    for command in (
        ("profile", model, "--text", path, "--output", tmp_path / "p"),
        ("eval", model, "--text", path),
        ("compress", model, "--with", "reap", "--text", path, "--output", tmp_path / "out"),
        ("fit", model, "--ratio", "0.5", "--text", path, "--output", tmp_path / "out"),
    ):
        refused(*command, naming=["bad.txt", word])


def test_text_that_is_not_there(refused, model, tmp_path):
    refused("eval", model, "--text", f"code={tmp_path / 'x.txt'}", naming="x.txt does not exist")
    refused("eval", model, naming="--text")
    refused("profile", model, "--output", tmp_path / "p", naming="--text")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("raep:keep=0.5", ["raep", "reap"]),
        ("reap:kep=0.5", ["kep", "keep"]),
        ("reap:keep=half", ["keep=half"]),
        ("reap:keep", ["key=value"]),
        ("rtn:bits=5", ["bits"]),
    ],
)
def test_an_unknown_method_or_option(refused, model, profile, tmp_path, spec, words):
    output = ("--profile", profile, "--output", tmp_path / "out")
    refused("compress", model, "--with", spec, *output, naming=words)
    refused("plan", model, "--with", spec, *output, naming=words)


def test_no_method_and_unknown_names(refused, model, profile, tmp_path):
    refused("compress", model, "--profile", profile, "--output", tmp_path / "out", naming="--with")
    refused("plan", model, "--profile", profile, "--output", tmp_path / "out", naming="--with")
    refused("inspectt", model, naming="inspect")
    refused("inspect", model, "--jsn", naming="--json")
    refused("inspect", naming="MODEL")
    refused("systems", "easy-epp", naming="easy-ep")
    refused("systems", "--wing", "compres", naming="compress")
    planned = next(row.key for row in records() if row.outcome == "planned")
    refused("reproduce", planned, naming=[planned, "no experiment"])
    refused("reproduce", "easy-ep", "--seeds", "a,b", naming="--seeds")
    refused("reproduce", "easy-ep", "--seeds", "3", naming="at least 2")
    refused("eval", model, "--task", "arithmetics", naming="arithmetic")
    refused("eval", model, "--task", "sorting", "--device", "tpu", naming="tpu")


@pytest.mark.parametrize(
    ("keep", "words"),
    [("0", "keep=0"), ("0.0", "keep=0.0"), ("9", "only 8"), ("1", "top-k"), ("0.1", "top-k"), ("1.5", "1.5")],
)
def test_keeping_too_few_or_too_many(refused, model, profile, tmp_path, keep, words):
    spec = ("--with", f"reap:keep={keep}", "--profile", profile)
    refused("compress", model, *spec, "--output", tmp_path / "out", naming=words)


def test_a_profile_of_another_model(refused, profile, tmp_path):
    other = make_model(tmp_path / "other", seed=1, num_experts=4)
    for command in (
        ("plan", other, "--with", "reap"),
        ("compress", other, "--with", "reap"),
        ("fit", other, "--ratio", "0.5"),
    ):
        refused(*command, "--profile", profile, "--output", tmp_path / "out", naming="profile is of another model")


def test_what_is_no_profile(refused, model, text, tmp_path):
    for path in (text, tmp_path / "nowhere"):
        refused("plan", model, "--with", "reap", "--profile", path, "--output", tmp_path / "x", naming=str(path))
    refused("plan", model, "--with", "reap", "--output", tmp_path / "x", naming=["--profile", "--text"])


@pytest.fixture
def plan(model, profile, tmp_path):
    path = tmp_path / "plan.json"
    assert call("plan", model, "--with", "reap:keep=0.5", "--profile", profile, "--output", path)[0] == 0
    return path


def _edited(change):
    """A change to the first layer's record."""

    def edit(text):
        found = json.loads(text)
        change(next(iter(found["layers"].values())))
        return json.dumps(found)

    return edit


NONSENSE = {
    "no JSON": (lambda text: text[:-30], "not JSON"),
    "no plan": (lambda text: "{}", "is no plan"),
    "a version to come": (lambda text: text.replace('"version": 1', '"version": 99'), "version 99"),
    "another model": (lambda text: json.dumps(json.loads(text) | {"source": "0" * 64}), "0000"),
    "an unknown layer": (lambda text: text.replace("model.layers.1.mlp", "model.layers.7.mlp"), "model.layers.7.mlp"),
    "an unknown key": (lambda text: json.dumps(json.loads(text) | {"method": []}), "did you mean 'methods'"),
    "an absent expert": (_edited(lambda layer: layer["experts"].__setitem__(0, {"from": 99})), "99"),
    "an absent row": (_edited(lambda layer: layer["rows"].__setitem__(0, 99)), "99"),
    "an absent slot": (_edited(lambda layer: layer["slots"].__setitem__(0, 99)), "99"),
    "strange bits": (_edited(lambda layer: layer["experts"].__setitem__(0, {"from": 0, "bits": 5})), "5"),
    "fewer rows than top-k": (
        _edited(lambda layer: [layer[k].__delitem__(slice(1, None)) for k in layer if isinstance(layer[k], list)]),
        "top-k",
    ),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_plan_edited_into_nonsense(refused, model, plan, tmp_path, kind):
    change, word = NONSENSE[kind]
    plan.write_text(change(plan.read_text()))
    refused("apply", model, plan, "--output", tmp_path / "out", naming=word)


def test_a_budget_no_plan_can_meet(refused, model, profile, tmp_path):
    rest = ("--profile", profile, "--output", tmp_path / "out")
    refused("fit", model, "--size", "10KB", *rest, naming="the smallest possible is")
    refused("fit", model, "--ratio", "0.99", *rest, naming="the smallest possible is")
    refused("fit", model, "--memory", "1KB", "--context", "4096", *rest, naming="cache")
    refused("fit", model, "--ratio", "1.5", *rest, naming="ratio=1.5")
    refused("fit", model, *rest, naming="exactly one budget")
    refused("fit", model, "--size", "6 apples", *rest, naming="6 apples")
    refused("fit", model, "--ratio", "0.5", "--profile", profile, naming="--output")


def test_an_output_that_cannot_be_written(refused, model, profile, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there").mkdir()
    compress = ("compress", model, "--with", "reap:keep=0.5", "--profile", profile, "--output")
    refused(*compress, tmp_path / "file" / "out", naming=str(tmp_path / "file"))
    refused(*compress, tmp_path / "there", naming="--overwrite")
    refused("plan", model, "--with", "reap", "--profile", profile, "--output", tmp_path / "file", naming="--overwrite")
    refused("profile", model, "--text", tmp_path / "file", "--output", tmp_path / "file", naming="--overwrite")
    refused("fit", model, "--ratio", "0.5", "--profile", profile, "--output", tmp_path / "there", naming="--overwrite")
    refused("verify", tmp_path / "nowhere", "--against", model, naming="nowhere")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk(model, profile, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of the work."""
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code, out, err = call(
            "compress", model, "--with", "reap:keep=0.5", "--profile", profile, "--output", tmp_path / "out"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "out" in err
    assert not (tmp_path / "out").exists()
    assert {name: when for name, when in tree(tmp_path).items() if name in before} == before


@pytest.mark.parametrize("cap", ["1MB", "0GB", "much"])
def test_a_cap_below_what_is_needed(refused, model, text, profile, tmp_path, cap):
    words = "smallest" if cap == "1MB" else cap
    refused("profile", model, "--text", text, "--output", tmp_path / "p", "--max-ram", cap, naming=words)
    compress = ("compress", model, "--with", "reap:keep=0.5", "--profile", profile, "--output", tmp_path / "out")
    refused(*compress, "--max-ram", cap, naming=words)
    refused("eval", model, "--text", text, "--max-ram", cap, naming=words)


def test_a_chat_without_a_template(refused, model, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    refused("eval", model, "--text", path, naming="chat template")


def test_tensors_of_the_model_are_untouched_by_all_of_this(model):
    assert torch.isfinite(load_file(model / "model.safetensors")["model.embed_tokens.weight"]).all()
