"""Recipes: read on top of one another, carried out, killed and taken up again with the same bits."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import TINY_RECIPE

from moekit.errors import OptionError, OutputError
from moekit.nn.parts import make
from moekit.nn.schedule import COURSES, Moment, Schedule
from moekit.train import TrainOptions
from moekit.train.recipe import Recipe, carry_out, recipes
from moekit.train.trained import METRICS, sharded, train_to

TINY = f"""{TINY_RECIPE}
steps = 6
accumulate = 2

[[schedule]]
set = "*.mlp.gate.selector.k"
course = {{kind = "steps", values = [4, 2], at = [0.5]}}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    return Recipe.read(tmp_path / "tiny.toml")


def batches(step):
    return {"input_ids": torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(step))}


def test_a_recipe_stands_on_the_base_and_replaces_what_it_names(recipe):
    config = recipe.config()
    assert (config.hidden_size, config.num_key_value_heads, config.qk_norm) == (16, 2, True)
    assert config.balance == {"load": 0.01}
    assert recipe.options.steps == 6
    assert recipe.options.weight_decay == Recipe.read("base").options.weight_decay


def test_tables_are_merged_and_parts_are_replaced(tmp_path):
    (tmp_path / "a.toml").write_text('[model]\nrouter = {select = {kind = "top-p", p = 0.3}}\n[model.balance]\nz = 1\n')
    (tmp_path / "b.toml").write_text(
        f'extends = "{tmp_path / "a.toml"}"\n[model]\nrouter = {{select = {{kind = "top-k", k = 1}}, score = "mlp"}}\n'
    )
    model = Recipe.read(tmp_path / "b.toml").model
    assert model["router"] == {"select": {"kind": "top-k", "k": 1}, "score": "mlp"}
    assert model["balance"] == {"load": 0.01, "z": 1}


def test_what_a_recipe_extends_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "parent.toml").write_text("[train]\nsteps = 7\n")
    (tmp_path / "sub" / "child.toml").write_text('extends = "parent.toml"\n[train]\nbatch = 3\n')
    (tmp_path / "parent.toml").write_text("[train]\nsteps = 8\n")
    monkeypatch.chdir(tmp_path)
    read = Recipe.read("sub/child.toml")
    assert (read.options.steps, read.batch) == (7, 3)


def test_schedules_batches_and_the_bias_move_as_told(recipe):
    used = []
    model, record = carry_out(recipe, batches, after_step=lambda step, record, run: used.append(run.load[0].sum()))
    assert [int(count) for count in used] == [2 * 4 * 12 * k for k in (4, 4, 4, 2, 2, 2)]
    assert len(record.losses) == 6
    assert set(record.parts) == {"cross_entropy", "load", "max_violation"}
    assert model.model.layers[0].mlp.gate.bias.abs().max() > 0


def test_a_frozen_router_is_not_trained_and_stays_frozen_when_loaded(recipe, tmp_path):
    frozen = recipe.with_model(router={"score": {"kind": "linear", "frozen": True}}, correction=None)
    weight = frozen.build().model.layers[0].mlp.gate.scorer.weight.clone()
    model, record = carry_out(frozen, batches)
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        assert torch.equal(one.model.layers[0].mlp.gate.scorer.weight, weight)
        assert not one.model.layers[0].mlp.gate.scorer.weight.requires_grad
    assert not [name for name in record.trained if "scorer" in name]


def test_a_model_without_experts_has_no_violation(recipe):
    """And no NaN, which is no JSON: the course of a training is read by others."""
    plain = dataclasses.replace(recipe.with_model(feed_forward="nothing"), schedule=())
    _, record = carry_out(plain.with_options(steps=1), batches)
    assert record.parts["max_violation"] == [0.0]


def test_two_batches_accumulated_are_one_of_both(recipe):
    plain = recipe.with_model(correction=None, balance={"load": 0.0})
    both = lambda step: {"input_ids": torch.cat([batches(2 * step + i)["input_ids"] for i in (0, 1)])}  # noqa: E731
    one, _ = carry_out(plain, batches)
    other, _ = carry_out(plain.with_options(accumulate=1), both)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_bfloat16_keeps_weights_in_float32(recipe):
    model, record = carry_out(recipe.with_options(dtype="bfloat16", steps=2), batches)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(loss == loss for loss in record.losses)


def test_a_trained_folder_loads_and_tells_its_course(recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    drawn = []
    record = train_to(recipe, batches, tmp_path / "out", draw=lambda lines, folder: drawn.append(len(lines)))
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == record.losses
    assert drawn == [6]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_experts == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.toml"]
    with pytest.raises(OutputError, match="exists: choose another folder or give --overwrite"):
        train_to(recipe, batches, tmp_path / "out")


def test_a_nan_in_a_router_stops_training_with_one_line(recipe):
    model = recipe.build()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.scorer.weight[0] = float("nan")
    with pytest.raises(OptionError, match="the loss at step 0 is nan"):
        carry_out(recipe, batches, model)


def test_what_was_drawn_goes_back(recipe):
    entry = {"set": "*.mlp.gate.selector.k", "course": {"kind": "draw", "values": [1]}}
    model, _ = carry_out(dataclasses.replace(recipe, schedule=(entry,)), batches)
    assert {layer.mlp.gate.selector.k for layer in model.model.layers} == {2}


PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
import moekit.train.loop as loop
from moekit.train.recipe import Recipe
from moekit.train.trained import train_to
loop.SAVE_EVERY = 2
folder, die = Path(sys.argv[1]), int(sys.argv[2])
def batches(step):
    return {"input_ids": torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(step))}
def progress(step, steps):
    if step == die:
        os.kill(os.getpid(), signal.SIGKILL)
torch.set_num_threads(1)
train_to(Recipe.read(folder / "tiny.toml"), batches, folder / sys.argv[3], progress=progress)
"""


def test_killed_it_goes_on_to_the_same_bits(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)

    def call(die, name):
        return subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), str(die), name], check=False).returncode

    assert call(3, "out") == -9
    assert not (tmp_path / "out").exists()
    assert call(0, "out") == 0
    assert call(0, "whole") == 0
    for name in ("model.safetensors", "config.json", "recipe.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    course = [
        [json.loads(line)["loss"] for line in (tmp_path / which / METRICS).read_text().splitlines()]
        for which in ("out", "whole")
    ]
    assert course[0] == course[1]
    assert len(course[0]) == 6


def test_ranks_share_the_rows_of_a_batch():
    parts = [sharded(batches, rank, 2)(0)["input_ids"] for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), batches(0)["input_ids"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[modl]\nx = 1", r"there is no table \[modl\] in a recipe"),
        ("[train]\nstep = 1", r"\[train\] has no option 'step'; it has"),
        ("[train]\nbatch = 0", "batch=0 in"),
        ("[train]\nlength = 1", r"length=1 in \[train\] must be a whole number from 2 on"),
        ("[[schedule]]\nset = 'x'", r"a \[\[schedule\]\] says what to set and its course"),
        ("[train]\naccumulate = 0", "accumulate=0: give a whole number from 1 on"),
        ("[train]\ndtype = 'int8'", "dtype='int8': give one of float32, bfloat16"),
        ("model = 3", "model=3 must be a table"),
        ("train = [1]", r"train=\[1\] must be a table: write \[train\]"),
        ("schedule = 3", r"schedule must be a list of tables: write \[\[schedule\]\] above each"),
        ("schedule = [1]", "schedule must be a list of tables"),
        ("[schedule]\nset = 'x'\ncourse = 'y'", "schedule must be a list of tables"),
        ("[[schedule]]\nset = 3\ncourse = 'y'", r"a \[\[schedule\]\] sets the name of an attribute"),
        ("[[schedule]]\nset = 'x'\ncourse = 3", r"a \[\[schedule\]\] sets the name of an attribute"),
        ("extends = 3", "extends=3 must be the name of a recipe or of a file"),
        ("extends = 'bad.toml'", r"stands on itself: \S+bad.toml extends \S+bad.toml$"),
        ("not toml", "is no recipe: "),
    ],
)
def test_what_is_no_recipe(tmp_path, text, said):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(OptionError, match=said):
        Recipe.read(tmp_path / "bad.toml")


def test_what_no_model_can_be():
    with pytest.raises(OptionError, match=r"there is no recipe 'nothing': name a TOML file, or one of .*base"):
        Recipe.read("nothing")
    with pytest.raises(OptionError, match=r"\[model\] has no field 'expertz'"):
        Recipe.read("base").with_model(expertz=3).config()
    with pytest.raises(OptionError, match=r"\[model\] is no valid configuration: "):
        Recipe.read("base").with_model(hidden_size="wide").config()
    with pytest.raises(OptionError, match="pad_token_id=258 is not among the 40 tokens"):
        Recipe.read("base").with_model(vocab_size=40).config()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"set": "*.gates.k", "course": {"kind": "linear", "start": 1, "end": 2}}, "no module of the model is called"),
        ({"set": "*.mlp.gate.k", "course": {"kind": "linear", "start": 1, "end": 2}}, "Router has no attribute 'k'"),
        ({"set": "*.mlp.gate.selector.k", "course": {"kind": "up"}}, "course 'up' is not known"),
    ],
)
def test_what_no_schedule_can_set(recipe, entry, said):
    with pytest.raises(OptionError, match=said):
        Schedule(recipe.build(), entry["set"], entry["course"])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "linear", "start": 1, "end": 2, "begin": 0.6, "until": 0.5}, "both are shares of the run"),
        ({"kind": "exponential", "start": 0, "end": 2}, "both must be positive"),
        ({"kind": "steps", "values": [1, 2], "at": []}, "2 values need 1 rising shares"),
        ({"kind": "draw", "values": [1, 2], "chances": [1]}, "2 values need as many chances"),
        ({"kind": "pool", "own": 0}, "own=0 is a share"),
    ],
)
def test_courses_that_cannot_be(spec, said):
    with pytest.raises(OptionError, match=said):
        make("course", COURSES, spec)


def test_courses_at_their_ends_and_between():
    at = lambda spec, step: make("course", COURSES, spec)(Moment(step, 100), torch.nn.Identity())  # noqa: E731
    straight = {"kind": "linear", "start": 2, "end": 10, "begin": 0.2, "until": 0.6}
    assert [at(straight, step) for step in (0, 20, 40, 60, 99)] == pytest.approx([2, 2, 6, 10, 10])
    assert at({"kind": "exponential", "start": 1, "end": 16}, 50) == pytest.approx(4)
    assert at({"kind": "cosine", "start": 4, "end": 0}, 50) == pytest.approx(2)
    drawn = [at({"kind": "draw", "values": [1, 2], "chances": [3, 1]}, step) for step in range(100)]
    assert drawn == [at({"kind": "draw", "values": [1, 2], "chances": [3, 1]}, step) for step in range(100)]
    assert 60 <= drawn.count(1) <= 90


@pytest.mark.parametrize("key", recipes())
def test_every_recipe_of_the_package_trains(key, tmp_path):
    """For two steps, into a folder: what its schedules end with is then what the model says."""
    recipe = Recipe.read(key).with_model(hidden_size=16, head_dim=8).with_options(steps=2)
    record = train_to(recipe, batches, tmp_path / "out")
    assert len(record.losses) == 2
    assert torch.tensor(record.losses).isfinite().all()


def test_the_recipe_in_the_documentation_trains(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "building.md").read_text()
    (tmp_path / "shown.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    shown = Recipe.read(tmp_path / "shown.toml")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "moe_intermediate_size": 8, "head_dim": 8}
    record = train_to(shown.with_model(**small).with_options(steps=4), batches, tmp_path / "out")
    assert len(record.losses) == 4
    assert set(record.parts) == {"cross_entropy", "load", "z", "max_violation"}


def test_options_round_trip():
    assert TrainOptions(accumulate=2, dtype="bfloat16").accumulate == 2
