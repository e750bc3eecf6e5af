"""Which tokens are sampled: the same whichever way text is divided, domains in turn, every expert served."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.contract import Routing
from moekit.errors import OptionError, ProfileError
from moekit.kernels import run
from moekit.plan import LayerPlan, StoredExpert
from moekit.profile import FIELDS, Profile, profile
from moekit.profile._reservoir import Quota, Reservoir, pick
from moekit.stream import LoadedModel, StreamedModel

EXPERTS = 6


@st.composite
def tokens(draw):
    """(priority, domain, expert [N, 2]) of tokens whose last expert is rare."""
    number = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    priority = rng.permutation(10 * number)[:number].astype(np.uint64)
    odds = np.array([8, 4, 4, 2, 2, 0.3])
    expert = np.stack([rng.choice(EXPERTS, 2, replace=False, p=odds / odds.sum()) for _ in range(number)])
    expert[rng.random((number, 2)) < 0.1] = -1
    return priority, rng.integers(0, 3, number), expert


@given(tokens(), st.integers(1, 40), st.integers(0, 6), st.integers(1, 20))
def test_batch_by_batch_keeps_what_the_rule_keeps_of_everything(seen, total, each, size):
    reservoir = Reservoir(total, each)
    kept, most = np.zeros(1000, dtype=np.uint64), 0
    for start in range(0, len(seen[0]), size):
        part = tuple(array[start : start + size] for array in seen)
        position, place = reservoir.admit(*part)
        kept[place] = part[0][position]
        most = max(most, len(reservoir.order))
    assert np.array_equal(kept[reservoir.order], seen[0][pick(*seen, tokens=total, each=each)])
    assert reservoir.order.max() < most, "places are given on"


@given(tokens(), st.integers(1, 40), st.integers(0, 6), st.integers(0, 60))
def test_a_sample_of_samples_is_the_sample_of_the_whole(seen, total, each, cut):
    parts = [tuple(array[:cut] for array in seen), tuple(array[cut:] for array in seen)]
    samples = [tuple(array[pick(*part, tokens=total, each=each)] for array in part) for part in parts]
    joined = tuple(np.concatenate(arrays) for arrays in zip(*samples, strict=True))
    assert np.array_equal(
        joined[0][pick(*joined, tokens=total, each=each)], seen[0][pick(*seen, tokens=total, each=each)]
    )


@given(tokens(), st.integers(1, 40), st.integers(1, 6))
def test_every_expert_has_its_share_as_far_as_there_is_text(seen, total, each):
    priority, _, expert = seen
    chosen = pick(*seen, tokens=total, each=each)
    assert len(set(chosen.tolist())) == len(chosen)
    found = [(expert[chosen] == e).any(1).sum() for e in range(EXPERTS)]
    there = [(expert == e).any(1).sum() for e in range(EXPERTS)]
    assert all(f >= min(each, t) for f, t in zip(found, there, strict=True))
    base = pick(*seen, tokens=total, each=0)
    assert np.array_equal(chosen[: len(base)], base)
    assert len(base) == min(total, len(priority))
    extra = chosen[len(base) :]
    assert len(extra) <= EXPERTS * each
    for token in extra.tolist():
        earlier = [(priority[(expert == e).any(1)] < priority[token]).sum() for e in expert[token] if e >= 0]
        assert min(earlier) < each, "an extra token is among the first of one of its experts"


@given(tokens(), st.integers(1, 40))
def test_domains_take_turns(seen, total):
    priority, domain, _ = seen
    chosen = pick(*seen, tokens=total, each=0)
    counts, there = np.bincount(domain[chosen], minlength=3), np.bincount(domain, minlength=3)
    whole = counts == there
    assert counts[~whole].max(initial=0) - counts[~whole].min(initial=10**6) <= 1 or (~whole).sum() < 2
    assert counts[whole].max(initial=0) <= counts[~whole].min(initial=10**6) + 1 or whole.all()
    for d in range(3):
        assert set(priority[chosen[domain[chosen] == d]]) == set(np.sort(priority[domain == d])[: counts[d]])


def test_an_even_router_needs_no_more_tokens_than_its_share():
    """One token serves several experts: twice an even share of everyone is about twice as many tokens, not 2K times."""
    rng = np.random.default_rng(0)
    expert = np.stack([rng.permutation(16)[:4] for _ in range(4000)])
    quota = Quota(200, 2.0)
    assert quota.each(16, 4) == 100
    assert quota.most(16, 4) == 1800
    chosen = pick(
        rng.permutation(4000).astype(np.uint64), np.zeros(4000, int), expert, tokens=200, each=quota.each(16, 4)
    )
    assert 400 <= len(chosen) < 520


BALANCED = {"sequence_length": 48, "sample": 16, "balanced": 2.0, "device": "cpu", "statistics": list(FIELDS)}


@pytest.fixture(scope="module")
def balanced(saved, texts):
    return profile(saved, texts, **BALANCED)


def test_a_balanced_profile_gives_every_expert_its_share(balanced, saved, texts):
    plain = profile(saved, texts, **{**BALANCED, "balanced": 0.0})
    for name, layer in balanced.layers.items():
        wanted = balanced.quota.each(layer.num_experts, layer.top_k)
        assert wanted == np.ceil(2.0 * layer.top_k / layer.num_experts * 16)
        assert (layer.sampled() >= np.minimum(wanted, layer.total("counts"))).all()
        assert np.array_equal(layer.hidden[:16], plain.layers[name].hidden)
        assert np.array_equal(layer.sample_priority[:16], plain.layers[name].sample_priority)
        assert len(plain.layers[name].hidden) == 16 < len(layer.hidden)
    assert any((layer.sampled() < wanted).any() for layer in plain.layers.values())
    (table,) = [table for table in balanced.tables() if table.title == "Sample"]
    assert [row[0] for row in table.rows] == list(balanced.layers)
    assert [row[1] for row in table.rows] == [len(layer.hidden) for layer in balanced.layers.values()]
    assert not [table for table in plain.tables() if table.title == "Sample"]


def test_experts_without_enough_sampled_tokens_are_named(balanced, saved, texts):
    assert all((balanced.layers[n].sampled()[list(e)] == 0).all() for n, e in balanced.undersampled(1).items())
    few = profile(saved, {"d": ["to"]}, sample=2, balanced=2.0, device="cpu", held_out=0.0)
    for name, experts in few.undersampled().items():
        layer = few.layers[name]
        assert experts == tuple(np.flatnonzero(layer.sampled() < few.quota.each(layer.num_experts, layer.top_k)))
    assert few.undersampled()
    (table,) = [table for table in few.tables() if table.title == "Sample"]
    assert str(next(iter(few.undersampled().values()))[0]) in table.rows[0][-1]
    bare = profile(saved, texts, statistics=["counts"], device="cpu")
    with pytest.raises(ProfileError, match="the profile has no 'sample_expert'"):
        bare.undersampled()


def test_streamed_and_merged_balanced_profiles_are_the_same(balanced, saved, texts, tmp_path):
    checkpoint = Checkpoint.open(saved)
    for runner in (StreamedModel(checkpoint), LoadedModel.load(checkpoint)):
        assert profile(runner, texts, **BALANCED).fingerprint == balanced.fingerprint
    whole = profile(saved, texts, **BALANCED, held_out=0.0)
    one, two = (profile(saved, {name: texts[name]}, **BALANCED, held_out=0.0) for name in ("words", "code"))
    merged = one.merge(two)
    for name, layer in whole.layers.items():
        for statistic in ("sample_priority", "sample_domain", "sample_expert"):
            assert np.array_equal(layer.array(statistic), merged.layers[name].array(statistic)), statistic
    merged.save(tmp_path / "merged")
    assert Profile.load(tmp_path / "merged").fingerprint == merged.fingerprint


def test_a_recombined_sample_names_the_experts_that_are_left(balanced):
    layer = list(balanced.layers.values())[-1]
    kept = layer.recombined(LayerPlan.keep([1, 4, 6], layer.num_experts))
    assert ((kept.sample_expert == 2) == (layer.sample_expert == 6)).all()
    assert ((kept.sample_expert == -1) == ~np.isin(layer.sample_expert, [1, 4, 6])).all()
    assert np.array_equal(kept.sample_logits, layer.sample_logits[:, [1, 4, 6]])
    assert np.array_equal(kept.sample_weight, layer.sample_weight)
    pairs = LayerPlan.aliased(
        [StoredExpert(((2 * m, 0.5), (2 * m + 1, 0.5))) for m in range(layer.num_experts // 2)],
        [e // 2 for e in range(layer.num_experts)],
    )
    merged = layer.recombined(pairs)
    assert np.array_equal(merged.sample_expert, layer.sample_expert // 2)
    assert np.array_equal(merged.sample_logits, layer.sample_logits.reshape(len(layer.hidden), -1, 2).max(2))


def test_hidden_alone_brings_what_its_sample_is_known_by(saved, texts):
    made = profile(saved, texts, statistics=["hidden"], sample=8, device="cpu", sequence_length=48)
    assert {"sample_expert", "sample_domain", "sample_priority"} < set(made.statistics)
    assert "sample_logits" not in made.statistics
    layer = next(iter(made.layers.values()))
    assert np.bincount(layer.sample_domain).tolist() == [4, 4]


def test_a_family_that_weighs_inputs_samples_what_its_experts_read(saved):
    text, tokenizer = {"d": ["the quick brown fox " * 8]}, Checkpoint.open(saved).tokenizer()
    model, _ = families.build("llama4", num_experts_per_tok=1)
    layer = next(iter(profile(model, text, tokenizer=tokenizer, sample=8, held_out=0.0).layers.values()))
    assert set(np.unique(layer.sample_weight)) == {1.0}
    block = blocks(model)[0]
    routing = Routing(torch.from_numpy(layer.sample_expert).long(), torch.ones(8, 1))
    norms = run(block.bank(), torch.from_numpy(layer.hidden), routing).norm(dim=-1)[:, 0]
    assert norms.min() > 0
    assert norms.max() <= layer.total("gate_norm").max() * (1 + 1e-5), "each is one term of a sum of these"
    several, _ = families.build("llama4", num_experts_per_tok=2)
    layer = next(iter(profile(several, text, tokenizer=tokenizer, sample=8).layers.values()))
    assert "sample_weight" not in layer.arrays, "no one input is what both experts read"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"balanced": -1.0}, "balanced is -1.0: give a multiple of an even share"),
        ({"balanced": float("nan")}, "balanced is nan: give a multiple"),
        ({"balanced": 2.0, "sample": 0}, "balanced is 2.0, but no tokens are sampled: give a sample above 0"),
    ],
)
def test_bad_balance_is_refused_in_one_line(saved, texts, options, words):
    with pytest.raises(OptionError, match=words) as caught:
        profile(saved, texts, **options)
    assert "\n" not in str(caught.value)
