"""Numbers of experts by a rule over depth."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wholes import lives, tiny

from moekit.errors import OptionError
from moekit.nn import MoekitConfig
from moekit.nn.depth import DEPTHS, per_layer

KINDS = st.sampled_from(sorted(DEPTHS))


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("uniform", [12, 12, 12, 12, 12]),
        ("ascending", [4, 8, 12, 16, 20]),
        ("descending", [20, 16, 12, 8, 4]),
        ("pyramid", [4, 12, 20, 12, 4]),
        ("valley", [20, 12, 4, 12, 20]),
        ("wave", [12, 20, 12, 4, 12]),
    ],
)
def test_by_hand(kind, counts):
    assert per_layer({"kind": kind, "low": 4, "high": 20}, 5) == counts


@given(KINDS, st.integers(1, 9), st.integers(1, 20), st.integers(0, 20))
def test_bounds_hold(kind, layers, low, more):
    counts = per_layer({"kind": kind, "low": low, "high": low + more}, layers)
    assert len(counts) == layers
    assert all(low <= count <= low + more for count in counts)


@given(KINDS, st.integers(1, 9), st.integers(1, 20), st.integers(0, 20), st.integers(0, 200))
def test_a_total_is_met_and_keeps_the_order(kind, layers, low, more, spare):
    bounds = {"kind": kind, "low": low, "high": low + more}
    free, met = per_layer(bounds, layers), per_layer({**bounds, "total": layers + spare}, layers)
    assert sum(met) == layers + spare
    assert min(met) >= 1
    for i in range(layers):
        for j in range(layers):
            assert free[i] <= free[j] or met[i] >= met[j]


def test_waves_have_periods():
    counts = per_layer({"kind": "wave", "low": 2, "high": 10, "periods": 2}, 9)
    assert counts == [math.floor(6 + 4 * math.sin(math.pi * layer / 2) + 0.5) for layer in range(9)]


def test_a_configuration_says_the_rule_and_keeps_the_numbers(tmp_path):
    rules = {"num_experts": {"kind": "descending", "low": 3, "high": 9}, "num_experts_per_tok": [2, 2, 1]}
    model = lives(tmp_path, num_hidden_layers=3, **rules)
    assert [layer.mlp.num_experts for layer in model.model.layers] == [9, 6, 3]
    assert MoekitConfig.from_pretrained(tmp_path).num_experts == [9, 6, 3]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"kind": "flat", "low": 1, "high": 2}, "numbers per layer 'flat' is not known"),
        ({"kind": "uniform", "low": 1}, "needs the option 'high'"),
        ({"kind": "uniform", "low": 3, "high": 2}, "from low=3 to high=2: give 1 <= low <= high"),
        ({"kind": "wave", "low": 1, "high": 2, "total": 1}, "total=1 over 2 layers: each needs one at least"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(OptionError, match=message):
        tiny(num_experts=rule)


def test_more_slots_than_experts_somewhere():
    with pytest.raises(OptionError, match="top-k of 4 among 3 experts"):
        tiny(num_experts={"kind": "ascending", "low": 3, "high": 5}, num_experts_per_tok=4)
