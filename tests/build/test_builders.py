"""What holds for every builder: headers, options that round-trip, errors, and outputs that are whole or not there."""

import dataclasses
import importlib
from pathlib import Path

import pytest
from building import dense, rows
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moekit.build
from moekit import systems
from moekit.build import Material, build, builder, builders
from moekit.build._write import FORMATS
from moekit.errors import OptionError, OutputError

MATERIAL = Material(rows=rows(), batch_size=4)
CHEAP = "llava-mod:dense_steps=0,sparse_steps=1"


@pytest.mark.parametrize("name", builders())
def test_a_builder_has_a_header_and_options_that_round_trip(name):
    made = builder(name)
    assert builder(made.spec) == made
    assert made.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 3
    row = systems.find(name)
    assert row.where == f"build/{name.replace('-', '_')}.py"
    assert importlib.import_module(f"moekit.lab.experiments.{row.key.replace('-', '_')}").__doc__


def test_builders_do_not_import_each_other():
    room = Path(moekit.build.__file__).parent
    stems = [name.replace("-", "_") for name in builders()]
    for stem in stems:
        source = (room / f"{stem}.py").read_text("utf-8")
        assert not [other for other in stems if f"moekit.build.{other} " in source]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lava-mod", "unknown builder 'lava-mod'; did you mean 'llava-mod'"),
        ("llava-mod:expert=4", "has no option 'expert'; did you mean 'experts'"),
        ("llava-mod:experts", "expected key=value, found 'experts'"),
        ("llava-mod:experts=4,experts=5", "'experts' is given twice"),
        ("llava-mod:experts=four", "experts=four is not a whole number"),
        ("llava-mod:lm=much", "lm=much is not a number"),
        ("llava-mod:preference=ppo", "preference=ppo is not dpo or kto_pair"),
        ("mote-ternary:ternary=maybe", "ternary=maybe is not true or false"),
    ],
)
def test_specifications_that_are_wrong(spec, message):
    with pytest.raises(OptionError, match=message):
        builder(spec)


def test_a_model_with_experts_is_no_source(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, vocab_size=40, num_experts=4)).save_pretrained(tmp_path / "moe")
    with pytest.raises(OptionError, match="has experts already: build makes them of a dense model"):
        build(tmp_path / "moe", builder(CHEAP), MATERIAL)


def test_outputs_are_never_in_the_way(folder, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("keep me")
    for place, overwrite, message in (
        (folder, True, "is the source itself"),
        (notes, False, "exists: choose another folder"),
        (notes, True, "holds something other than a model"),
    ):
        with pytest.raises(OutputError, match=message):
            build(folder, builder(CHEAP), MATERIAL, place, overwrite=overwrite)
    with pytest.raises(OptionError, match=f"format 'gguf': a build is written as {', '.join(FORMATS)}"):
        build(folder, builder(CHEAP), MATERIAL, tmp_path / "out", format="gguf")
    assert (notes / "mine.txt").read_text() == "keep me"


def test_an_output_that_does_not_load_is_not_published(folder, tmp_path, monkeypatch):
    def refuse(folder, **_):
        raise OutputError("it does not load")

    monkeypatch.setattr(importlib.import_module("moekit.build._write"), "reload_in_fresh_process", refuse)
    with pytest.raises(OutputError, match="it does not load"):
        build(folder, builder(CHEAP), MATERIAL, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_old_output_is_replaced_as_a_whole(folder, tmp_path):
    out = tmp_path / "out"
    dense().save_pretrained(out)
    (out / "old.txt").write_text("gone afterwards")
    build(folder, builder(CHEAP), MATERIAL, out, overwrite=True)
    assert (out / "build.json").is_file()
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
