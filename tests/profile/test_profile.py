"""Whole profiles of a tiny model: what is counted, whichever way the model runs, and what merging keeps."""

import numpy as np
import pytest
import torch

import families
from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError, OptionError, ProfileError, UnsupportedModelError
from moekit.plan import LayerPlan, Plan, StoredExpert
from moekit.profile import DEFAULT, FIELDS, Profile, profile
from moekit.stream import LoadedModel, StreamedModel


def layer_of(made, index=-1):
    return list(made.layers.values())[index]


def test_every_token_is_counted_once_per_slot(observed, saved):
    assert observed.domains == ("words", "code")
    assert observed.source == Checkpoint.open(saved).fingerprint
    assert observed.model == saved.name
    for layer in observed.layers.values():
        assert layer.counts.sum() == layer.tokens.sum() * layer.top_k == observed.num_tokens * layer.top_k
        assert np.allclose(layer.probability.sum(-1), layer.tokens)
        assert np.array_equal(np.diag(layer.coactivation), layer.total("counts"))
        assert layer.counts[:, :, 1].sum() == 0, "nothing was decoded"
        assert layer.tokens[0].sum() > 0 < layer.tokens[1].sum()
    there = set(FIELDS) - {"max_abs_shared"}
    assert set(layer_of(observed).arrays) == there
    assert set(layer_of(observed, 0).arrays) == there - {"transition"}


def test_streamed_and_in_memory_give_the_same_profile(observed, saved, texts):
    checkpoint = Checkpoint.open(saved)
    for runner in (StreamedModel(checkpoint), LoadedModel.load(checkpoint)):
        again = profile(runner, texts, sequence_length=48, statistics=list(FIELDS))
        assert again.fingerprint == observed.fingerprint


def test_a_live_model_with_its_tokenizer(observed, saved, texts):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    tokenizer = Checkpoint.open(saved).tokenizer()
    made = profile(model, texts, tokenizer=tokenizer, sequence_length=48, statistics=list(FIELDS))
    assert made.source == observed.source
    for name, layer in made.layers.items():
        assert np.array_equal(layer.counts, observed.layers[name].counts)
        assert np.allclose(layer.contribution, observed.layers[name].contribution, rtol=1e-4)
    with pytest.raises(OptionError, match="a live model needs its tokenizer"):
        profile(model, texts)


def test_padding_changes_no_figure(saved, texts):
    """Pieces of many lengths share batches; alone in a batch each is unpadded."""
    together = profile(saved, texts, sequence_length=48, device="cpu")
    from moekit.profile import observe

    before, observe.BATCH_TOKENS = observe.BATCH_TOKENS, 1
    try:
        alone = profile(saved, texts, sequence_length=48, device="cpu")
    finally:
        observe.BATCH_TOKENS = before
    for name, layer in together.layers.items():
        for statistic in ("counts", "tokens", "transition", "coactivation", "trace_expert"):
            if statistic in layer.arrays:
                assert np.array_equal(layer.array(statistic), alone.layers[name].array(statistic)), statistic
        for statistic in ("gate_norm", "contribution", "logit_gram", "hidden", "entropy"):
            assert np.allclose(layer.array(statistic), alone.layers[name].array(statistic), rtol=1e-4, atol=1e-5)


def test_the_trace_and_the_counts_tell_the_same_story(observed):
    layer = layer_of(observed)
    kept = layer.trace_expert[layer.trace_expert >= 0]
    assert len(observed.trace) == observed.num_tokens, "short enough to be traced whole"
    assert np.array_equal(np.bincount(kept, minlength=layer.num_experts), layer.total("counts"))
    assert layer.trace_weight.sum() == pytest.approx(layer.total("weight").sum(), rel=1e-6)
    first = layer_of(observed, -2)
    follows = np.zeros_like(layer.transition)
    for f, e in zip(first.trace_expert, layer.trace_expert, strict=True):
        follows[np.ix_(f, e)] += 1
    assert np.array_equal(follows, layer.transition)


def test_decoding_is_observed_apart(saved, texts):
    made = profile(saved, texts, sequence_length=24, decode_tokens=3, max_tokens=96, device="cpu")
    layer = layer_of(made)
    sequences = made.options["sequences"]
    assert layer.total("tokens", phase="prefill") == 96
    assert 0 < layer.total("tokens", phase="decode") <= 3 * sequences
    assert layer.counts.sum() == layer.tokens.sum() * layer.top_k
    decoded = made.trace["phase"] == 1
    assert (layer.trace_expert[decoded] >= 0).any(1).sum() == layer.total("tokens", phase="decode")
    with pytest.raises(OptionError, match="decode_tokens needs the model in memory"):
        profile(StreamedModel(Checkpoint.open(saved)), texts, decode_tokens=3)


def test_merging_adds_what_was_seen_apart(saved, texts):
    options = {"sequence_length": 48, "held_out": 0.0, "device": "cpu", "statistics": list(FIELDS)}
    one, two = (profile(saved, {name: texts[name]}, **options) for name in ("words", "code"))
    whole, merged = profile(saved, texts, **options), one.merge(two)
    assert merged.domains == whole.domains
    for name, layer in whole.layers.items():
        other = merged.layers[name]
        for statistic in ("counts", "tokens", "coactivation", "transition"):
            if statistic in layer.arrays:
                assert np.array_equal(layer.array(statistic), other.array(statistic))
        for statistic, field in FIELDS.items():
            if field.merge != "rows" and statistic in layer.arrays:
                assert np.allclose(layer.array(statistic), other.array(statistic), rtol=1e-4, atol=1e-6), statistic
        for statistic in ("sample_priority", "sample_domain", "sample_expert"):
            assert np.array_equal(layer.array(statistic), other.array(statistic)), statistic
        for statistic in ("hidden", "sample_weight", "sample_logits"):
            assert np.allclose(layer.array(statistic), other.array(statistic), atol=1e-5), statistic
        assert len(other.trace_expert) == len(merged.trace) == len(one.trace) + len(two.trace)
    assert (merged.trace["domain"][len(one.trace) :] == 1).all()
    twice = merged.merge(merged)
    assert np.array_equal(layer_of(twice).counts, 2 * layer_of(merged).counts)
    assert np.array_equal(layer_of(twice).max_abs_down, layer_of(merged).max_abs_down)


def test_what_cannot_be_merged(observed, saved, texts):
    from dataclasses import replace

    with pytest.raises(ProfileError, match="the profile is of another model"):
        observed.merge(replace(observed, source="0" * 64))
    fewer = profile(saved, texts, statistics=["counts"], device="cpu")
    with pytest.raises(ProfileError, match=r"only one of the profiles has '\w+' for layer"):
        observed.merge(fewer)


def test_held_out_text_was_not_observed(observed, saved, texts):
    everything = profile(saved, texts, sequence_length=48, held_out=0.0, device="cpu", statistics=["counts"])
    aside = sum(len(ids) for pieces in observed.held_out.values() for ids in pieces)
    assert aside > 0
    assert observed.num_tokens + aside == everything.num_tokens
    assert not any(everything.held_out.values())


def test_a_pruned_layer_keeps_the_columns_of_what_it_keeps(observed):
    name, layer = next(iter(observed.layers.items()))
    keep = [1, 4, 6]
    plan = Plan(source=observed.source, layers={name: LayerPlan.keep(keep, layer.num_experts)})
    pruned = observed.recombined(plan)
    left = pruned.layers[name]
    assert (left.num_experts, left.top_k) == (3, 2)
    assert np.array_equal(left.counts, layer.counts[..., keep])
    assert np.array_equal(left.coactivation, layer.coactivation[np.ix_(keep, keep)])
    assert np.array_equal(left.expert_moments, layer.expert_moments[keep])
    assert np.array_equal(left.max_abs_down, layer.max_abs_down[keep])
    assert set(np.unique(left.trace_expert)) <= {-1, 0, 1, 2}
    assert ((left.trace_expert == 2) == (layer.trace_expert == 6)).all()
    others = [other for other in observed.layers if other != name]
    assert all(pruned.layers[other] is observed.layers[other] for other in others)


def test_a_merged_expert_gets_what_its_members_got(observed):
    name, layer = next(iter(observed.layers.items()))
    stored = [StoredExpert(((0, 0.5), (3, 0.5))), *(StoredExpert(((e, 1.0),)) for e in (1, 2, 4, 5, 6, 7))]
    plan = Plan(source=observed.source, layers={name: LayerPlan.aliased(stored, (0, 1, 2, 0, 3, 4, 5, 6))})
    merged = observed.recombined(plan).layers[name]
    assert merged.num_experts == 7
    assert np.array_equal(merged.total("counts")[0], layer.total("counts")[[0, 3]].sum())
    assert merged.total("counts").sum() == layer.total("counts").sum()
    assert merged.max_abs_down[0] == layer.max_abs_down[[0, 3]].max()


def test_totals_by_domain_phase_and_half(observed):
    layer = layer_of(observed)
    whole = layer.total("gate_norm")
    assert np.allclose(whole, layer.total("gate_norm", ["words"]) + layer.total("gate_norm", ["code"]))
    assert np.allclose(whole, layer.total("gate_norm", half=0) + layer.total("gate_norm", half=1))
    assert np.array_equal(whole, layer.total("gate_norm", phase="prefill"))
    with pytest.raises(ProfileError, match="no domain 'poetry': it has words, code"):
        layer.total("counts", ["poetry"])
    with pytest.raises(ProfileError, match="no phase 'training'"):
        layer.total("counts", phase="training")
    with pytest.raises(ProfileError, match="'coactivation' is not kept by domain"):
        layer.total("coactivation", ["code"])
    with pytest.raises(AttributeError):
        _ = layer.nonsense


def test_how_far_to_trust_a_figure(observed):
    layer = layer_of(observed)
    a, b = layer.share("counts", half=0), layer.share("counts", half=1)
    assert np.allclose(layer.error("counts"), np.abs(a - b) / 2)
    assert -1 <= layer.reliability("gate_norm") <= 1
    halves = layer.counts.copy()
    halves[1] = halves[0]
    from dataclasses import replace

    same = replace(layer, arrays={**layer.arrays, "counts": halves})
    assert same.reliability("counts") == pytest.approx(1.0)
    halves[1] = 0
    assert np.isnan(same.reliability("counts"))


def test_starved_experts_are_named(observed):
    least = int(layer_of(observed, 0).total("counts").min()) + 1
    expected = np.flatnonzero(layer_of(observed, 0).total("counts") < least)
    assert observed.starved(least)[next(iter(observed.layers))] == tuple(expected)
    assert observed.starved(0) == {}


def test_only_what_was_asked_for_is_kept_and_the_rest_is_named(saved, texts):
    made = profile(saved, texts, statistics=["gate_norm"], device="cpu", max_tokens=64, sample=0, trace=0)
    assert made.statistics == ("counts", "gate_norm", "tokens")
    made.require(["gate_norm"])
    with pytest.raises(ProfileError, match="the profile has no 'contribution' for layer") as caught:
        made.require(["contribution"])
    assert "profile again with this statistic" in str(caught.value)
    assert "input_moments" not in DEFAULT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"statistics": ["cuonts"]}, "unknown statistic 'cuonts': did you mean 'counts'"),
        ({"max_tokens": 3}, "max_tokens is 3: at least 2 are needed for each of the 2 domains"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"held_out": 0.9}, "held_out is 0.9: give a share between 0 and 0.5"),
        ({"sample": -1}, "sample is -1: it cannot be negative"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"max_ram": "lots"}, "is no amount of memory"),
    ],
)
def test_bad_options_are_refused_in_one_line(saved, texts, options, words):
    with pytest.raises(OptionError, match=words) as caught:
        profile(saved, texts, **options)
    assert "\n" not in str(caught.value)


def test_a_cap_too_small_is_refused_before_anything_runs(saved, texts):
    with pytest.raises(BudgetError, match="the smallest cap that works is"):
        profile(saved, texts, max_ram="1MB")


def test_encoder_decoders_are_refused(texts, tmp_path, saved):
    model, _ = families.build("switch_transformers")
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder model"):
        profile(model, texts, tokenizer=Checkpoint.open(saved).tokenizer())


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "llama4", "jetmoe", "nemotron_h", "gemma4", "zaya"])
def test_odd_families_are_profiled_alike(family, saved, tmp_path):
    model, _ = families.build(family)
    tokenizer = Checkpoint.open(saved).tokenizer()
    made = profile(model, {"d": ["the quick brown fox " * 8]}, tokenizer=tokenizer, sequence_length=32)
    for layer in made.layers.values():
        assert 0 < layer.counts.sum() <= layer.tokens.sum() * layer.top_k
        assert all(np.isfinite(array).all() for array in layer.arrays.values())
        assert layer.total("output_norm").sum() > 0
    assert isinstance(made, Profile)
    assert torch.is_tensor(next(model.parameters()))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_shared_experts_are_seen_as_they_run(family, saved):
    model, _ = families.build(family)
    tokenizer, seen = Checkpoint.open(saved).tokenizer(), {}

    def remember(name):
        def hook(_, args, output):
            seen[name] = max(seen.get(name, 0.0), float(output.abs().max()))

        return hook

    from moekit.blocks import blocks

    for block in blocks(model):
        block.shared[0].register_forward_hook(remember(block.name))
    text = {"d": ["the quick brown fox " * 2]}
    made = profile(model, text, tokenizer=tokenizer, statistics=["max_abs_shared"], held_out=0.0)
    for name, layer in made.layers.items():
        assert layer.max_abs_shared.shape == (1,)
        assert layer.max_abs_shared[0] == pytest.approx(seen[name])


def test_samples_and_moments_that_do_not_fit_are_refused_before_anything_runs(saved, texts, monkeypatch):
    monkeypatch.setattr("moekit.profile.observe.kept_bytes", lambda *given: 10**12)
    with pytest.raises(BudgetError, match=r"keeping samples and second moments of every layer needs 1000\.0 GB"):
        profile(saved, texts, max_ram="8GB", statistics=["expert_moments"])


def test_what_grows_is_counted_as_it_is_kept(observed, saved):
    from moekit.blocks import blocks
    from moekit.profile._reservoir import Quota
    from moekit.profile._watch import kept_bytes

    model = LoadedModel.load(Checkpoint.open(saved)).model
    large = [name for name, field in FIELDS.items() if field.axes[0] == "s" or name.endswith("_moments")]
    kept = sum(layer.array(name).nbytes for layer in observed.layers.values() for name in large)
    assert kept_bytes(blocks(model), large, Quota(64), 10**6) == kept
    assert kept_bytes(blocks(model), ["counts"], Quota(64), 10**6) == 0
    few = kept_bytes(blocks(model), ["hidden"], Quota(64), 8)
    assert few == kept_bytes(blocks(model), ["hidden"], Quota(8), 10**6)
