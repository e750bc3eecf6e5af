"""A paged model is a transformers model: it generates what the resident one generates, and says what goes wrong."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError, CheckpointError, OptionError
from moekit.run import answer, load, paging, policies
from moekit.run._policies import LRU
from moekit.run._policies_scored import MultiTerm
from moekit.run.answer import belady, prompt_ids
from moekit.run.paging import _page_by
from moekit.stream import LoadedModel


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open("moekit:mini")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(32, 120, (1, 30), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def expected(checkpoint, ids):
    model = LoadedModel.load(checkpoint).model
    model.set_experts_implementation("moekit")
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.fixture
def opened():
    models = []

    def make(*args, share=None, **options):
        models.append(load(*args, **options))
        if share is not None:
            served = paging(models[-1])
            served.store.resize(int(share * served.expert_bytes))
        return models[-1]

    yield make
    for model in models:
        paging(model).close()


def greedy(model, ids, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.125])
@pytest.mark.parametrize("ahead", [0, 3])
def test_the_tokens_are_the_resident_models_at_every_cap(opened, checkpoint, ids, expected, share, ahead):
    model = opened(checkpoint, share=share, ahead=ahead)
    assert torch.equal(greedy(model, ids), expected)
    counters = paging(model).store.counters
    assert counters.misses > 0
    assert (counters.prefetch_bytes > 0) == (ahead > 0)


@pytest.mark.parametrize("name", policies())
def test_no_policy_changes_the_tokens(opened, checkpoint, ids, expected, name):
    assert torch.equal(greedy(opened(checkpoint, share=0.2, policy=name), ids), expected)


def test_an_untuned_model_reads_ahead_where_not_all_fits(opened, checkpoint, ids, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = opened(checkpoint, share=0.25)
    served = paging(model)
    assert (type(served.store.policy.inner), served.width) == (LRU, 0)  # all fitted when it was opened
    _page_by(served, checkpoint, None, None)
    assert (type(served.store.policy), served.width) == (MultiTerm, served.blocks[0].top_k)
    assert torch.equal(greedy(model, ids), expected)
    assert served.store.counters.prefetch_bytes > 0
    _page_by(served, checkpoint, None, 0)
    assert (served.width, served.predictor) == (0, None)


def test_batches_with_padding(opened, checkpoint):
    ids = torch.tensor([[0, 0, 40, 41, 42], [50, 51, 52, 53, 54]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    resident = LoadedModel.load(checkpoint).model
    resident.set_experts_implementation("moekit")
    one = greedy(resident, ids, attention_mask=mask)
    assert torch.equal(greedy(opened(checkpoint, share=0.2), ids, attention_mask=mask), one)


def test_an_answer_says_what_it_took(opened, checkpoint, ids, expected):
    model, said = opened(checkpoint, share=0.25), []
    made, cost = answer(model, ids, 12, tokenizer=checkpoint.tokenizer(), say=said.append)
    assert torch.equal(made, expected[0, 30:])
    assert "".join(said) == checkpoint.tokenizer().decode(made, skip_special_tokens=True)
    assert (cost.prompt_tokens, cost.new_tokens) == (30, 12)
    assert cost.counters.requests == cost.counters.hits + cost.counters.misses
    assert cost.bound is not None
    assert cost.counters.hit_rate <= cost.bound
    assert cost.bytes_per_token == pytest.approx(cost.counters.demand_bytes / 41)
    assert json.loads(json.dumps(cost.as_dict()))["hit_rate"] == cost.counters.hit_rate
    assert paging(model).history is None


def test_the_bound_needs_room_for_a_whole_layer(opened, checkpoint):
    served = paging(opened(checkpoint, share=0.02))
    assert belady(served, [(layer, (0, 1, 2, 3, 4)) for layer in range(6)]) is None


def test_sampling_is_seeded(opened, checkpoint, ids):
    model = opened(checkpoint, share=0.5)
    one, _ = answer(model, ids, 8, temperature=1.0, seed=3)
    two, _ = answer(model, ids, 8, temperature=1.0, seed=3)
    assert torch.equal(one, two)


def test_longer_than_reckoned_with_is_refused(opened, checkpoint, ids):
    model = opened(checkpoint, context=32)
    with pytest.raises(BudgetError, match="33 tokens are to be held, but memory was set aside for 32"):
        greedy(model, ids)


def test_gradients_are_refused(opened, checkpoint, ids):
    model = opened(checkpoint)
    with torch.enable_grad(), pytest.raises(OptionError, match="no backward"):
        model(ids, use_cache=False)


def test_what_is_not_in_memory_cannot_be_read_past_the_store(opened, checkpoint, tmp_path):
    model = opened(checkpoint)
    with pytest.raises(NotImplementedError, match="meta"):
        model.save_pretrained(tmp_path / "copy")


def test_only_paged_models_have_a_paging(checkpoint):
    with pytest.raises(OptionError, match="open it with moekit"):
        paging(LoadedModel.load(checkpoint).model)


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        ({"policy": "lra"}, "unknown cache policy 'lra'"),
        ({"context": 0}, "context and threads must be at least 1"),
        ({"ahead": -1}, "ahead at least 0"),
        ({"memory": "much"}, "is no amount of memory"),
    ],
)
def test_options_are_checked(checkpoint, options, naming):
    with pytest.raises(OptionError, match=naming):
        load(checkpoint, **options)


def test_a_cap_below_the_rest_of_the_model_is_refused(checkpoint):
    with pytest.raises(BudgetError, match="the smallest cap that works is"):
        load(checkpoint, "50MB")


def copied(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint.path, folder)
    return Checkpoint.open(folder), next(folder.glob("*.safetensors"))


def test_a_file_that_changes_under_a_running_model_is_noticed(opened, checkpoint, tmp_path, ids):
    mine, file = copied(checkpoint, tmp_path)
    model = opened(mine, share=0.2)
    greedy(model, ids)
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\0")
    with pytest.raises(CheckpointError, match="was changed while in use"):
        greedy(model, ids)


def test_a_file_that_ends_too_soon_is_noticed(opened, checkpoint, tmp_path, ids):
    mine, file = copied(checkpoint, tmp_path)
    model = opened(mine, share=0.2)
    os.truncate(file, file.stat().st_size // 3)
    with pytest.raises(CheckpointError, match="changed while in use"):
        greedy(model, ids)


def test_a_disk_error_reaches_the_caller(opened, checkpoint, ids, monkeypatch):
    model = opened(checkpoint, share=0.2)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        greedy(model, ids)
    monkeypatch.undo()
    greedy(model, ids)


def test_two_models_on_one_checkpoint(opened, checkpoint, ids, expected):
    one, two = opened(checkpoint, share=0.2), opened(checkpoint, share=0.3)
    assert torch.equal(greedy(one, ids), expected)
    assert torch.equal(greedy(two, ids), expected)


def test_prompts(checkpoint):
    tokenizer = checkpoint.tokenizer()
    assert prompt_ids(tokenizer, "abc", chat=False).shape[0] == 1
    with pytest.raises(OptionError, match="no chat template"):
        prompt_ids(tokenizer, "abc", chat=True)
    with pytest.raises(OptionError, match="the prompt is empty"):
        prompt_ids(tokenizer, "", chat=False)


PROGRAM = """
import sys, torch
from moekit.run import load, answer, prompt_ids
from moekit.checkpoint import Checkpoint
from moekit.stream import peak_rss
checkpoint = Checkpoint.open("moekit:mini")
model = load(checkpoint, int(sys.argv[1]), context=64)
made, cost = answer(model, prompt_ids(checkpoint.tokenizer(), "def f(x):", False), 40)
print(peak_rss(), cost.experts, made.tolist()[:5])
"""


def test_the_cap_that_a_message_names_is_enough_and_holds():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(cap):
        command = [sys.executable, "-c", PROGRAM, str(cap)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    refused = start(100_000_000)
    named = int(refused.stderr.rsplit("works is ", 1)[1].split("MB")[0]) * 10**6
    done = start(named)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) <= named
