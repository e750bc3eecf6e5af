"""What sampled tokens say about experts, against plain loops and against the model itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from moekit.bank import Activation, ExpertWeights
from moekit.blocks import blocks
from moekit.compress import _sample
from moekit.compress._sample import Sample
from moekit.errors import ProfileError
from moekit.formats import DenseBank, PackedBank
from moekit.plan import LayerPlan
from moekit.profile import profile
from moekit.profile.layer import LayerProfile

E, H, INNER, S, K = 5, 6, 4, 23, 2


def bank(seed: int = 0, dtype: torch.dtype = torch.float32, biased: bool = True) -> DenseBank:
    g = torch.Generator().manual_seed(seed)
    shapes = [(E, 2 * INNER, H), (E, H, INNER), (E, 2 * INNER), (E, H)]
    tensors = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    return DenseBank(*tensors) if biased else DenseBank(*tensors[:2])


def layer(seed: int = 0, unused: int = 4) -> LayerProfile:
    """No token chooses ``unused``; one slot is empty; two domains in turn."""
    draw = np.random.default_rng(seed)
    others = [e for e in range(E) if e != unused]
    expert = np.stack([draw.permutation(others)[:K] for _ in range(S)]).astype(np.int32)
    weight = draw.random((S, K)).astype(np.float32)
    expert[3, 1], weight[3, 1] = -1, 0
    arrays = {
        "hidden": draw.normal(size=(S, H)).astype(np.float32),
        "sample_expert": expert,
        "sample_weight": weight,
        "sample_domain": np.arange(S, dtype=np.int32) % 2,
    }
    return LayerProfile("layer", 0, E, K, ("code", "prose"), arrays)


def plain(weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    z = weights.gate_up.double() @ x.double() + weights.gate_up_bias.double()
    units = torch.nn.functional.silu(z[:INNER]) * z[INNER:]
    return weights.down.double() @ units + weights.down_bias.double()


def slots(sample: Sample):
    for t in range(len(sample)):
        for k in range(K):
            if (e := int(sample.routing.expert[t, k])) >= 0:
                yield t, e, float(sample.routing.weight[t, k])


def test_every_expert_has_its_own_tokens() -> None:
    sample = Sample.of(layer())
    for e in range(E):
        own = sample.own(e)
        pairs = [(t, w) for t, f, w in slots(sample) if f == e]
        assert own.token_N.tolist() == [t for t, _ in pairs]
        assert own.weight_N.tolist() == pytest.approx([w for _, w in pairs])
        assert torch.equal(own.x_NH, sample.x_SH[own.token_N])
    assert sample.count_E.sum() == S * K - 1
    assert sample.starved() == (4,)
    assert sample.starved(10**6) == tuple(range(E))


def test_domains_and_a_bound_choose_tokens() -> None:
    whole = Sample.of(layer())
    assert torch.equal(Sample.of(layer(), ["prose"]).x_SH, whole.x_SH[1::2])
    assert torch.equal(Sample.of(layer(), ["code", "prose"], most=4).x_SH, whole.x_SH[:4])
    with pytest.raises(ProfileError, match="the profile has no domain 'maths': it has code, prose"):
        Sample.of(layer(), ["maths"])
    with pytest.raises(ProfileError, match="layer layer has no sampled tokens to work with: profile again with more"):
        Sample.of(layer(), most=0)
    bare = replace(layer(), arrays={"hidden": layer().hidden})
    with pytest.raises(ProfileError, match="the profile has no 'sample_expert' for layer layer"):
        Sample.of(bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_the_layer_are_a_plain_sum(dtype: torch.dtype) -> None:
    sample, weights = Sample.of(layer()), bank(dtype=dtype)
    expected = torch.zeros(S, H, dtype=torch.float64)
    for t, e, w in slots(sample):
        expected[t] += w * plain(weights.expert(e), sample.x_SH[t])
    torch.testing.assert_close(_sample.moe_output(sample, weights).double(), expected, rtol=1e-5, atol=1e-5)
    one = _sample.output(weights.expert(2), weights.activation, sample.x_SH)
    torch.testing.assert_close(one[7].double(), plain(weights.expert(2), sample.x_SH[7]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_replacing_one_expert_changes_the_layer_by_exactly_that(packed: bool) -> None:
    sample, before, other = Sample.of(layer()), bank(), bank(1)
    if packed:
        other = PackedBank.quantise(before, 2, 2).dequantise()
    for e in range(E):
        after = DenseBank.stack([(other if f == e else before).expert(f) for f in range(E)], before.activation)
        change = _sample.moe_output(sample, before).double() - _sample.moe_output(sample, after).double()
        found = _sample.replaced_error(sample, before, e, other.expert(e))
        assert found == pytest.approx(float(change.norm()), rel=1e-4, abs=1e-6)
        assert (found == 0) == (e == 4), "nobody chose expert 4"
        assert _sample.replaced_error(sample, before, e, before.expert(e)) == 0


@settings(max_examples=20)
@given(st.integers(1, 4000))
def test_blocks_of_tokens_do_not_matter(max_bytes: int) -> None:
    sample, weights = Sample.of(layer()), bank()
    found = torch.cat(list(_sample.dense_outputs(weights, sample.x_SH, max_bytes)), dim=1)
    expected = torch.stack([_sample.output(weights.expert(e), weights.activation, sample.x_SH) for e in range(E)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(
        y.shape[1] <= max(1, max_bytes // (4 * E * H)) for y in _sample.dense_outputs(weights, sample.x_SH, max_bytes)
    )


def test_likeness_of_outputs() -> None:
    sample, weights = Sample.of(layer()), bank()
    weights.gate_up[3], weights.down[3] = weights.gate_up[1], 2 * weights.down[1]
    weights.gate_up_bias[3], weights.down_bias[3] = weights.gate_up_bias[1], 2 * weights.down_bias[1]
    weights.down[0], weights.down_bias[0] = 0, 0
    y = torch.cat(list(_sample.dense_outputs(weights, sample.x_SH)), dim=1).double()
    cosine, gram = _sample.output_likeness(weights, sample.x_SH, max_bytes=999)
    for i in range(E):
        for j in range(E):
            assert float(gram[i, j]) == pytest.approx(float((y[i] * y[j]).sum()), rel=1e-4, abs=1e-5)
            expected = float(torch.cosine_similarity(y[i], y[j], dim=1).mean()) if i and j else 0.0
            assert float(cosine[i, j]) == pytest.approx(expected, abs=1e-5)
    assert float(cosine[1, 3]) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_second_moments_are_of_what_each_matrix_reads(dtype: torch.dtype, weighted: bool) -> None:
    sample, weights = Sample.of(layer()), bank()
    seen = 0
    for part in _sample.expert_moments(sample, weights, weighted=weighted, dtype=dtype, max_bytes=1000):
        assert part.input_CHH.dtype == part.unit_CII.dtype == dtype
        assert len(part.experts) < E
        for c, e in enumerate(part.experts):
            inputs, units = torch.zeros(H, H).double(), torch.zeros(INNER, INNER).double()
            for t, f, w in slots(sample):
                if f == e:
                    x = sample.x_SH[t]
                    u = _sample.hidden_units(weights.expert(e), weights.activation, x[None])[0].double()
                    inputs += (w if weighted else 1) * torch.outer(x.double(), x.double())
                    units += (w if weighted else 1) * torch.outer(u, u)
            torch.testing.assert_close(part.input_CHH[c].double(), inputs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(part.unit_CII[c].double(), units, rtol=1e-5, atol=1e-4)
            assert part.tokens[c] == sample.count_E[e]
            seen += 1
    assert seen == E


def test_a_starved_expert_has_no_moments_or_borrowed_ones() -> None:
    sample, weights = Sample.of(layer()), bank()
    (part,) = _sample.expert_moments(sample, weights)
    assert not part.input_CHH[4].any()
    assert part.tokens[4] == 0
    (lent,) = _sample.expert_moments(sample, weights, lend=True, weighted=True)
    torch.testing.assert_close(lent.input_CHH[4], sample.x_SH.T @ sample.x_SH)
    assert lent.tokens[4] == 0
    (weighed,) = _sample.expert_moments(sample, weights, weighted=True)
    assert torch.equal(lent.input_CHH[:4], weighed.input_CHH[:4])


def test_ungated_experts_without_biases() -> None:
    sample = Sample.of(layer())
    weights = bank(biased=False)
    ungated = DenseBank(weights.gate_up[:, :INNER], weights.down, activation=Activation("relu", torch.relu, False))
    units = _sample.hidden_units(ungated.expert(1), ungated.activation, sample.x_SH)
    torch.testing.assert_close(units, torch.relu(sample.x_SH @ weights.gate_up[1, :INNER].T))


def test_a_merged_expert_named_twice_counts_once_with_both_weights() -> None:
    merged = layer().recombined(LayerPlan.keep([0], E))
    assert merged.num_experts == 1
    twice = replace(merged, arrays={**merged.arrays, "sample_expert": np.zeros((S, K), np.int32)})
    own = Sample.of(twice).own(0)
    assert own.token_N.tolist() == list(range(S))
    assert own.weight_N.tolist() == pytest.approx(layer().sample_weight.sum(1).tolist())


class Letters:
    """One token per character of a vocabulary of 96."""

    bos_token, pad_token_id = None, 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 90 + 4 for c in text]}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"])
def test_a_sample_of_everything_adds_up_to_the_profile(family: str) -> None:
    """Outputs and weights recomputed from the sample give the sums that were observed as the model ran."""
    only = {"num_experts_per_tok": 1} if family == "llama4" else {}
    model, _ = families.build(family, **only)
    text = {"d": ["the quick brown fox " * 6]}
    seen = profile(model, text, tokenizer=Letters(), sample=10**6, device="cpu")
    for block in blocks(model):
        one, weights = seen.layers[block.name], block.bank()
        sample = Sample.of(one)
        assert len(sample) == seen.num_tokens
        total, alone = np.zeros(one.num_experts), []
        for e in range(one.num_experts):
            own = sample.own(e)
            y = _sample.output(weights.expert(e), weights.activation, own.x_NH)
            total[e] = float((own.weight_N * y.norm(dim=1)).sum())
            alone.append(torch.zeros(len(sample), y.shape[1]).index_add(0, own.token_N, own.weight_N[:, None] * y))
        np.testing.assert_allclose(total, one.total("gate_norm"), rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(_sample.moe_output(sample, weights), sum(alone), rtol=1e-4, atol=1e-5)
