"""Scores against plain loops, domains against each other, and the detector on experts planted to be found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.compress._scores import SCORES, balanced, mixed, shares, super_experts, tcess
from moekit.errors import OptionError, ProfileError
from moekit.profile import FIELDS
from moekit.profile.layer import LayerProfile

E, S = 6, 40


def layer(seed: int = 0, number: int = 0, **arrays: np.ndarray) -> LayerProfile:
    """Every statistic that a score needs, over two domains; ``tokens`` and winning logits are those of the sample."""
    draw = np.random.default_rng(seed)
    logits, domain = draw.normal(size=(S, E)), (np.arange(S) % 2).astype(np.int32)
    logits[:, 5] -= 10
    winner = logits.argmax(1)
    tokens, strong = np.zeros((2, 2, 2)), np.zeros((2, 2, 2, E))
    for t in range(S):
        tokens[0, domain[t], 0] += 1
        strong[0, domain[t], 0, winner[t]] += logits[t, winner[t]]
    counts = draw.integers(0, 9, (2, 2, 2, E)).astype(float)
    names = ("probability", "selected_probability", "weight", "gate_norm", "contribution")
    sums = {name: draw.random(counts.shape) * counts for name in names}
    seen = {
        "tokens": tokens, "strong_logit": strong, "counts": counts, "sample_logits": logits, "sample_domain": domain,
        "sample_expert": np.argsort(-logits, axis=1)[:, :2].astype(np.int32), "max_abs_down": draw.random(E),
    }  # fmt: skip
    return LayerProfile(f"layer{number}", number, E, 2, ("code", "prose"), sums | seen | arrays)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_needs_what_it_says_and_speaks_of_the_named_domains(name: str) -> None:
    score, one = SCORES[name], layer()
    assert score.needs <= FIELDS.keys()
    bare = replace(one, arrays={n: one.arrays[n] for n in score.needs})
    both, code, prose = (score.of(bare, domains) for domains in ((), ("code",), ("prose",)))
    assert both.shape == (E,)
    assert np.array_equal(both, score.of(one, ["code", "prose"]))
    assert not np.allclose(code, prose)
    assert score.why
    for needed in score.needs:
        with pytest.raises(ProfileError, match=f"the profile has no '{needed}'"):
            score.of(replace(one, arrays={n: a for n, a in bare.arrays.items() if n != needed}), ())
    with pytest.raises(ProfileError, match="the profile has no domain 'maths'"):
        score.of(one, ["maths"])


def plain_tcess(logits: np.ndarray, strongest: int, threshold: float) -> np.ndarray:
    total = np.zeros(E)
    for z in logits:
        top = sorted(range(E), key=lambda e: (-z[e], e))[:strongest]
        q = np.exp([z[e] for e in top])
        for e, share in zip(top, q / q.sum(), strict=True):
            if share >= threshold:
                total[e] += z[e]
    return total / len(logits)


@given(st.integers(0, 50), st.integers(1, E), st.sampled_from([-1.0, 0.0, 0.2, 0.5, 1.0]))
def test_tcess_is_the_mean_of_strong_raw_logits(seed: int, strongest: int, threshold: float) -> None:
    one = layer(seed)
    found = tcess(one, strongest=strongest, threshold=threshold)
    np.testing.assert_allclose(found, plain_tcess(one.sample_logits, strongest, threshold), rtol=1e-9)
    prose = tcess(one, ["prose"], strongest=strongest, threshold=threshold)
    np.testing.assert_allclose(prose, plain_tcess(one.sample_logits[1::2], strongest, threshold), rtol=1e-9)


def test_a_share_at_the_threshold_counts() -> None:
    even = layer(sample_logits=np.tile([2.0, 2, -9, -9, -9, -9], (S, 1)))
    assert tcess(even, strongest=2, threshold=0.5).tolist() == [2, 2, 0, 0, 0, 0]
    assert not tcess(even, strongest=2, threshold=0.51).any()


def test_a_negative_winner_scores_below_an_expert_that_never_wins() -> None:
    one = layer(sample_logits=np.tile([-1.0, -2, -3, -4, -5, -6], (S, 1)))
    assert tcess(one, strongest=2)[0] < tcess(one, strongest=2)[5] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strongest": 0}, "strongest=0 of 6 router logits: give 1 to 6"),
        ({"strongest": 7}, "strongest=7 of 6 router logits"),
        ({"threshold": 1.5}, "threshold=1.5 is above every share of a softmax"),
        ({"threshold": float("nan")}, "threshold=nan is above"),
    ],
)
def test_tcess_settings_out_of_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        tcess(layer(), **options)


def test_tcess_without_sampled_tokens() -> None:
    empty = layer(sample_expert=np.zeros((0, 2), np.int32), sample_logits=np.zeros((0, E)))
    with pytest.raises(ProfileError, match="layer layer0 has no sampled tokens to work with"):
        tcess(empty, strongest=2)


def test_mixed_domains_weigh_alike_whatever_their_text() -> None:
    one = layer()
    contribution = np.zeros((2, 2, 2, E))
    contribution[0, 0, 0], contribution[0, 1, 0] = [400, 0, 0, 0, 100, 0], [0, 3, 0, 0, 1, 0]
    one = replace(one, arrays={**one.arrays, "contribution": contribution})
    np.testing.assert_allclose(balanced(one, "contribution", one.domains), [0.8, 0.75, 0, 0, 0.45, 0])
    alone = mixed(lambda domains: SCORES["contribution"].of(one, domains), ["prose"])
    np.testing.assert_allclose(alone, [0, 0.75, 0, 0, 0.25, 0])
    np.testing.assert_allclose(shares(np.array([3.0, -1.0])), [0.75, -0.25])
    assert np.array_equal(shares(np.zeros(3)), np.zeros(3))


def stack(extreme: dict[tuple[int, int], float], layers: int = 8) -> dict[str, LayerProfile]:
    found = {}
    for number in range(layers):
        largest = 1 + np.random.default_rng(number).random(E)
        for (place, expert), value in extreme.items():
            if place == number:
                largest[expert] = value
        found[f"layer{number}"] = layer(number=number, max_abs_down=largest)
    return found


def test_a_planted_super_expert_is_found_and_nothing_else() -> None:
    assert super_experts(stack({(2, 3): 100.0})) == {"layer2": (3,)}
    assert super_experts(stack({(2, 3): 100.0, (1, 0): 95.0}), percentile=95) == {"layer1": (0,), "layer2": (3,)}
    assert super_experts(stack({(2, 3): 100.0, (1, 0): 9.0}), percentile=95) == {"layer2": (3,)}, "a tenth of the most"


def test_later_layers_do_not_count() -> None:
    assert super_experts(stack({(5, 3): 100.0})) == {"layer5": (3,)}
    late = super_experts(stack({(6, 3): 100.0, (2, 1): 3.0}))
    assert "layer6" not in late
    assert late == {"layer2": (1,)}
    assert super_experts(stack({(6, 3): 100.0}), depth=1.0) == {"layer6": (3,)}


def test_where_all_are_equal_there_is_no_super_expert() -> None:
    same = {name: layer(number=i, max_abs_down=np.ones(E)) for i, name in enumerate("abcd")}
    assert super_experts(same) == {}
    assert super_experts({}) == {}


def test_a_shared_expert_counts_and_is_named_apart() -> None:
    layers = stack({(2, 3): 30.0})
    one = layers["layer1"]
    layers["layer1"] = replace(one, arrays={**one.arrays, "max_abs_shared": np.array([1.0, 400.0])})
    assert super_experts(layers) == {"layer1": (-2,)}, "beside 400 the other is under a tenth"
