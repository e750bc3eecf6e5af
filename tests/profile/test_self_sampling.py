"""Text a model writes itself: the beam against brute force, its limits, and what is said about the result."""

import itertools
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import families
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import OptionError, TextError, UnsupportedModelError
from moekit.profile import profile, self_sample, self_sampled_texts, self_sampling
from moekit.profile._writer import Writer, usual_tokens
from moekit.profile.degeneracy import Degeneracy, degeneracy, plain_sample, usage_std
from moekit.stream import LoadedModel, StreamedModel


@pytest.fixture(scope="module")
def model(saved):
    return LoadedModel.load(Checkpoint.open(saved)).model


def remember(chosen, seen):
    chosen[seen.block.name] = seen.routing.expert


def brute_force(model, first, allowed, length, tau):
    """The sequence of least final cost among all there are, each read whole and without a cache."""
    found = blocks(model)
    best = (np.inf, None)
    for rest in itertools.product(allowed, repeat=length - 1):
        ids = [first, *rest]
        with ExitStack() as stack, torch.no_grad():
            chosen = {}
            for block in found:
                stack.enter_context(block.observe(partial(remember, chosen)))
            log = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        likely = sum(float(log[t, ids[t + 1]]) for t in range(length - 1))
        sigmas = []
        for block in found:
            share = np.bincount(chosen[block.name][: length - 1].flatten(), minlength=block.num_experts).astype(float)
            share /= share.sum()
            size = block.num_experts
            sigmas.append(np.sqrt(size / (size - 1) * ((share - 1 / size) ** 2).sum()))
        cost = -likely / length + np.mean(sigmas) / tau
        best = min(best, (cost, ids))
    return best[1]


@pytest.mark.parametrize("tau", [0.05, 1.2, 1e9])
def test_a_beam_that_holds_everything_finds_the_least_cost(model, tau):
    allowed = [7, 20, 33]
    found = self_sample(model, sequences=3, length=4, width=9, tau=tau, seed=1, allowed=allowed)
    assert all(ids.dtype == np.int64 and len(ids) == 4 for ids in found)
    for ids in found:
        assert ids.tolist() == brute_force(model, int(ids[0]), allowed, 4, tau)


def test_balance_changes_what_is_written(model):
    def at(tau):
        return np.stack(self_sample(model, sequences=8, length=16, width=4, tau=tau, allowed=range(4, 40)))

    even, likely = at(1e-3), at(1e9)
    assert not np.array_equal(even, likely)
    assert usage_std(model, list(even)) < usage_std(model, list(likely))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_runs_that_may_not_repeat_do_not(model, size):
    for ids in self_sample(model, sequences=3, length=20, width=2, allowed=range(4, 30), no_repeat=size):
        runs = [tuple(ids[i : i + size].tolist()) for i in range(20 - size + 1)]
        assert len(set(runs)) == len(runs)


def test_where_nothing_else_is_left_runs_repeat(model):
    (ids,) = self_sample(model, sequences=1, length=6, width=2, allowed=[5, 6], no_repeat=1)
    assert set(ids.tolist()) == {5, 6}


def test_one_beam_without_balance_is_greedy(model):
    (ids,) = self_sample(model, sequences=1, length=12, width=1, tau=1e12, seed=5)
    wrong = sorted(set(range(families.VOCAB)) - set(usual_tokens(model)))
    greedy = model.generate(
        torch.tensor([[int(ids[0])]]), max_new_tokens=11, min_new_tokens=11, do_sample=False,
        bad_words_ids=[[token] for token in wrong],
    )  # fmt: skip
    assert ids.tolist() == greedy[0].tolist()
    assert not set(ids.tolist()) & set(wrong)


def test_the_same_seed_writes_the_same_whatever_runs_together(model, monkeypatch):
    def write(**options):
        return np.stack(self_sample(model, sequences=6, length=10, width=2, **options))

    together = write(seed=3)
    assert np.array_equal(together, write(seed=3))
    assert not np.array_equal(together, write(seed=4))
    told = []
    monkeypatch.setattr(self_sampling, "ROWS", 4)
    assert np.array_equal(together, write(seed=3, progress=lambda done, of: told.append((done, of))))
    assert told == [(20, 60), (40, 60), (60, 60)]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "jamba", "qwen3_next"])
def test_caches_of_every_kind_follow_their_beams(family):
    """One step of a rearranged cache gives what reading the whole prefix gives."""
    model, _ = families.build(family)
    model.eval()
    first, second = torch.tensor([5, 9, 11]), torch.tensor([40, 41, 42])
    rows = torch.tensor([2, 0, 2])
    with Writer(model) as writer:
        writer.step(first)
        writer.choose_rows(rows)
        found = writer.step(second)
        usage = [each.clone() for each in writer.usage_RE]
    with torch.no_grad():
        whole = model(input_ids=torch.stack([first[rows], second], dim=1)).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
    for each, block in zip(usage, blocks(model), strict=True):
        assert torch.equal(each.sum(1), torch.full((3,), 2.0 * block.top_k))


def test_a_model_without_a_cache_is_refused(model):
    with Writer(model) as writer:
        writer.model = lambda **_: SimpleNamespace(logits=torch.zeros(1, 1, 4))
        with pytest.raises(UnsupportedModelError, match="keeps no cache that beams can share"):
            writer.step(torch.tensor([1]))


def test_a_cache_with_state_that_is_not_reordered_is_refused():
    """The cache of one family keeps its linear layers' state apart, where the inherited reordering does not reach."""
    model, _ = families.build("minimax")
    with pytest.raises(UnsupportedModelError, match="keeps no cache that beams can share"):
        self_sample(model.eval(), sequences=1, length=4)


def test_imbalance_runs_from_nought_to_one(model):
    writer = Writer(model)
    count = writer.blocks[0].num_experts
    writer.usage_RE = [torch.stack([torch.ones(count), torch.eye(count)[2] * 7]) for _ in writer.blocks]
    assert writer.imbalance().tolist() == pytest.approx([0.0, 1.0])


def test_repetition_and_use_are_told(model):
    often, never = np.array([5, 6] * 8), np.arange(5, 21)
    told = degeneracy(model, [often, often])
    assert told.distinct == pytest.approx((2 / 16, 2 / 15, 2 / 14))
    assert told.degenerate
    assert not degeneracy(model, [never, never]).degenerate
    assert Degeneracy((1, 1, 1), (1, 1, 1), 0.1, 0.2).balanced
    assert not Degeneracy((1, 1, 1), (1, 1, 1), 0.2, 0.2).balanced


def test_the_use_of_experts_is_what_a_profile_counts(saved, model):
    texts = {"self": plain_sample(model, [5, 6, 7], 20, seed=2)}
    made = profile(saved, texts, held_out=0.0, device="cpu")
    assert made.num_tokens == 60
    shares = [layer.total("counts") / layer.total("counts").sum() for layer in made.layers.values()]
    assert usage_std(model, texts["self"]) == pytest.approx(np.mean([share.std() for share in shares]))


def test_plain_text_follows_the_model(model):
    """Drawn tokens occur as often as the model says: the mean of their surprise is its entropy."""
    drawn = np.stack(plain_sample(model, [5] * 400, 2, seed=0))
    assert np.array_equal(drawn, np.stack(plain_sample(model, [5] * 400, 2, seed=0)))
    with torch.no_grad():
        log = model(input_ids=torch.tensor([[5]])).logits[0, 0].double()
    usual = usual_tokens(model)
    log = log[usual].log_softmax(0)
    surprise = [-float(log[usual.index(token)]) for token in drawn[:, 1].tolist()]
    entropy, spread = -float((log.exp() * log).sum()), np.std(surprise) / 20
    assert abs(np.mean(surprise) - entropy) < 4 * spread


def test_from_a_checkpoint_to_a_profile(saved):
    texts, told = self_sampled_texts(saved, "4x24", width=2, device="cpu")
    assert [len(ids) for ids in texts["self"]] == [24] * 4
    assert told.distinct[0] <= 1
    made = profile(saved, texts, sequence_length=24, held_out=0.0, device="cpu")
    assert made.domains == ("self",)
    assert made.num_tokens == 96
    tokenizer = Checkpoint.open(saved).tokenizer()
    assert not {int(t) for ids in texts["self"] for t in ids} & set(tokenizer.all_special_ids)


def test_ids_that_are_no_text_of_this_model(saved):
    with pytest.raises(TextError, match="the text holds token 96, but the model's vocabulary ends at 95"):
        profile(saved, {"d": [np.array([5, 96])]}, device="cpu", held_out=0.0)
    for wrong in (np.array([0.5, 1.0]), np.array([[1, 2]]), np.array([-1, 2])):
        with pytest.raises(TextError, match="domain 'd' holds an array that is no list of token ids"):
            profile(saved, {"d": [wrong]}, device="cpu")
    with pytest.raises(TextError, match="domain 'd' holds no text"):
        profile(saved, {"d": [np.array([], dtype=np.int64)]}, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequences": 0}, "sequences is 0: self-sampling needs at least 1"),
        ({"length": 1}, "length is 1: self-sampling needs at least 2"),
        ({"width": 0}, "width is 0: self-sampling needs at least 1"),
        ({"no_repeat": -1}, "no_repeat is -1: self-sampling needs at least 0"),
        ({"tau": 0.0}, "tau is 0.0: give a number above 0"),
        ({"length": 500}, "length is 500, but the model reads 128 tokens at most"),
        ({"allowed": []}, "allowed tokens must be some of 0 to 95"),
        ({"allowed": [96]}, "allowed tokens must be some of 0 to 95"),
    ],
)
def test_settings_out_of_range(model, options, words):
    with pytest.raises(OptionError, match=words):
        self_sample(model, **{"sequences": 2, "length": 8, **options})


def test_sizes_and_models_that_cannot_be(saved, monkeypatch):
    for wrong in ("32", "x128", "32x", "32*128", "many"):
        with pytest.raises(OptionError, match="is no size of self-sampled text: give sequences x tokens"):
            self_sampled_texts(saved, wrong)
    monkeypatch.setattr(self_sampling, "open_model", lambda *_: StreamedModel(Checkpoint.open(saved)))
    with pytest.raises(OptionError, match="self-sampling needs the model in memory"):
        self_sampled_texts(saved, "2x8")
