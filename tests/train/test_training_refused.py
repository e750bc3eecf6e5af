"""What `train_to` refuses and what it takes up again: schedules, recipes, texts and tokenizers that do not fit."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import TINY_RECIPE

import moekit.train.loop as loop
from moekit.errors import OptionError, OutputError
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.train import FinishStep, TrainOptions
from moekit.train.loop import training_device
from moekit.train.recipe import Recipe, Training, carry_out
from moekit.train.sequences import fingerprint
from moekit.train.trained import METRICS, check, sharded, train_to

K = "*.mlp.gate.selector.k"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.toml").write_text(f"{TINY_RECIPE}\nsteps = 3\n")
    return Recipe.read(tmp_path / "tiny.toml")


def batches(step):
    return {"input_ids": torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(step))}


def scheduled(recipe, start, end):
    """k from start to end."""
    entry = {"set": K, "course": {"kind": "linear", "start": start, "end": end}}
    return dataclasses.replace(recipe, schedule=(entry,))


def interrupted(recipe, output, **more):
    """A run that was stopped after two steps, with a state to go on from."""

    def stop(step, steps):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY", 1)
        with pytest.raises(KeyboardInterrupt):
            train_to(recipe, batches, output, progress=stop, **more)


def test_a_schedule_that_ends_elsewhere_than_the_config_is_refused_each_time(recipe, tmp_path):
    for _ in range(2):
        with pytest.raises(OptionError, match=r"k ends with 1, \[model\] says 2\): give \[model\] the values that"):
            train_to(scheduled(recipe, 2, 1), batches, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_schedule_of_a_size_is_refused_before_the_run(recipe, tmp_path):
    entry = {"set": "*.self_attn.head_dim", "course": {"kind": "steps", "values": [8, 3], "at": [0.5]}}
    with pytest.raises(OptionError, match=r"leaves a model that cannot compute \(.*head_dim ends with 3, \[model"):
        train_to(dataclasses.replace(recipe, schedule=(entry,)), batches, tmp_path / "out")


def test_a_course_that_no_step_reaches_the_end_of_ends_there(recipe, tmp_path):
    train_to(scheduled(recipe, 4, 2), batches, tmp_path / "out")
    used = [sum(json.loads(line)["load"][0]) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert used == [4 * 12 * k for k in (4, 3, 3)]
    model, _ = carry_out(scheduled(recipe, 4, 2), batches)
    assert {layer.mlp.gate.selector.k for layer in model.model.layers} == {2}


def test_a_finished_run_that_is_taken_up_ends_as_it_did(recipe, tmp_path):
    carry_out(scheduled(recipe, 4, 1), batches, folder=tmp_path)
    model, record = carry_out(scheduled(recipe, 4, 1), batches, folder=tmp_path)
    assert {layer.mlp.gate.selector.k for layer in model.model.layers} == {1}
    assert len(record.losses) == 3


def test_a_folder_that_holds_another_model_is_refused(recipe, tmp_path):
    model = recipe.build().eval()
    model.save_pretrained(tmp_path)
    check(model, tmp_path)
    for layer in model.model.layers:
        layer.mlp.gate.selector.k = 1
    with pytest.raises(OutputError, match="does not hold the model that was trained"):
        check(model, tmp_path)


def test_a_frozen_part_is_as_frozen_after_the_end(recipe):
    frozen = recipe.with_model(router={"score": {"kind": "linear", "frozen": True}}, correction=None)
    entry = {"set": "model.trainable", "course": {"kind": "steps", "values": [True], "at": []}}
    model, _ = carry_out(dataclasses.replace(frozen, schedule=(entry,)), batches)
    assert not model.model.layers[0].mlp.gate.scorer.weight.requires_grad


def test_a_refused_recipe_does_not_block_its_correction(recipe, tmp_path):
    with pytest.raises(OptionError, match="top-k of 9 among 4 experts"):
        train_to(recipe.with_model(num_experts_per_tok=9), batches, tmp_path / "out")
    assert not (tmp_path / ".out.training").exists()

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_to(recipe.with_model(wiring="momentum"), stop, tmp_path / "out")
    assert len(train_to(recipe, batches, tmp_path / "out").losses) == 3  # nothing had been learnt that could be lost


@pytest.mark.parametrize(
    "other",
    [
        lambda recipe: (recipe.with_model(wiring="momentum"), {"data": "a"}),
        lambda recipe: (recipe, {"data": "b"}),
        lambda recipe: (recipe, {"data": "a", "tokenizer": words("x", "y")}),
    ],
)
def test_an_unfinished_run_of_something_else_is_not_taken_up(recipe, tmp_path, other):
    interrupted(recipe, tmp_path / "out", data="a")
    changed, more = other(recipe)
    with pytest.raises(OptionError, match="holds an unfinished run of another recipe, text or tokenizer: remove it"):
        train_to(changed, batches, tmp_path / "out", **more)
    assert len(train_to(recipe, batches, tmp_path / "out", data="a").losses) == 3


def words(*known):
    """A tokenizer, as far as it is asked."""
    return SimpleNamespace(get_vocab=lambda: {word: number for number, word in enumerate(known)})


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(recipe, tmp_path):
    with pytest.raises(OptionError, match=r"the tokenizer has 41 tokens: give \[model\] vocab_size=41 or more, not 40"):
        train_to(recipe, batches, tmp_path / "out", tokenizer=words(*map(str, range(41))))
    assert not (tmp_path / ".out.training").exists()


def test_other_rows_have_another_fingerprint():
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    assert fingerprint(rows) == fingerprint([row.clone() for row in rows])
    others = ([torch.tensor([1]), torch.tensor([2, 3])], rows[::-1], [torch.tensor([1, 2]), torch.tensor([4])])
    assert fingerprint(rows) not in map(fingerprint, others)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.floats(), max_size=3)
)


@given(name=st.sampled_from([field.name for field in dataclasses.fields(TrainOptions)]), value=JUNK)
def test_an_option_is_taken_or_refused_in_one_line(name, value):
    refused = refusal(name, value)
    assert refused is None or refused.startswith(f"{name}={value!r}: give ")
    if isinstance(value, bool | None) or value != value:
        assert refused


def refusal(name, value):
    """What is said of an option; None where it is taken and makes a rate."""
    try:
        assert 0 <= TrainOptions(**{name: value}).factor(0) <= 1
    except OptionError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 2.5),
        ("steps", True),
        ("learning_rate", "fast"),
        ("betas", 0.9),
        ("betas", [0.9]),
        ("betas", [0.9, 1.5]),
        ("eps", -1.0),
        ("seed", -3),
        ("seed", 2**32),
        ("weight_decay", -1.0),
        ("max_norm", -1.0),
        ("accumulate", 1.5),
        ("warmup", float("nan")),
    ],
)
def test_options_of_a_wrong_type_or_out_of_range(recipe, name, value):
    with pytest.raises(OptionError, match=f"^{name}="):
        recipe.with_options(**{name: value})


def test_the_log_tells_how_uneven_the_load_is(recipe, tmp_path):
    running = Training(recipe.build(), recipe)
    running.load = [torch.tensor([2, 2, 2, 2]), torch.tensor([0, 0, 4, 4])]
    assert running.unevenness() == {"variation": pytest.approx(0.5), "dead": 2}
    train_to(recipe, batches, tmp_path / "out")
    for line in map(json.loads, (tmp_path / "out" / METRICS).read_text().splitlines()):
        assert line["dead"] == sum(count == 0 for layer in line["load"] for count in layer)
        assert 0 <= line["variation"] <= 3**0.5


@pytest.mark.parametrize(
    ("sublayer", "choices", "listed"),
    [
        ({"kind": "memory", "keys": 4, "top": 3, "width": 8}, 16, True),
        ({"kind": "memory", "keys": 40, "top": 3, "width": 8}, 1600, False),
        ({"kind": "decomposed", "sides": 6, "heads": 2, "keep": 2, "width": 4}, 12, True),
    ],
)
def test_the_log_counts_items_and_halves_too(sublayer, choices, listed, recipe, tmp_path):
    recipe = recipe.with_model(feed_forward=sublayer)
    train_to(recipe, batches, tmp_path / "out")
    layers = recipe.config().num_hidden_layers
    for line in map(json.loads, (tmp_path / "out" / METRICS).read_text().splitlines()):
        assert line["choices"] == layers * choices
        assert 0 <= line["dead"] < layers * choices
        assert line["variation"] > 0
        assert [len(counts) for counts in line["load"]] == [choices] * layers * listed
        assert all(sum(counts) >= 4 * 12 for counts in line["load"])


def test_nothing_is_drawn_while_a_model_is_written(recipe, tmp_path, capsys):
    train_to(recipe, batches, tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_a_batch_is_shared_by_no_more_processes_than_it_has_rows():
    assert len(sharded(batches, 3, 4)(0)["input_ids"]) == 1
    with pytest.raises(OptionError, match=r"5 processes cannot share a batch of 4 rows: give \[train\] batch=5"):
        sharded(batches, 0, 5)(0)


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    """As far as can be seen without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match="2 GPUs are visible"):
        training_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert training_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(OptionError, match="3 processes for 2 GPUs: start one for each, or use --device cpu"):
        training_device("cuda")


@pytest.mark.parametrize(("callbacks", "moved"), [([], False), ([FinishStep()], True)])
def test_under_the_trainer_of_transformers_a_callback_ends_the_step(tmp_path, callbacks, moved):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "pad_token_id": 0, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    balance = {"load": {"weight": 0.01, "scope": "accumulated"}}
    model = MoekitForCausalLM(
        MoekitConfig(**sizes, moe_intermediate_size=8, num_experts=4, correction={"rate": 0.01}, balance=balance)
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 40, (8, 6))]
    told = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, told, train_dataset=rows, callbacks=callbacks).train()
    layer = model.model.layers[0].mlp
    assert int(layer.correction.steps) == (2 if moved else 0)
    assert bool(layer.tally.count_E.any()) is not moved
