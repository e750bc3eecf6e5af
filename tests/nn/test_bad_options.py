"""What no part can be is refused by one clear line: wrong types, sizes that do not fit, courses that lead astray."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import tiny

from moekit.errors import OptionError
from moekit.nn import BALANCES, KINDS, MoekitConfig, Router, Site
from moekit.nn.activations import ACTIVATIONS
from moekit.nn.balance import balance_term
from moekit.nn.banks import BANKS
from moekit.nn.block import BLOCKS
from moekit.nn.correction import Correction
from moekit.nn.depth import DEPTHS
from moekit.nn.granularity import GRANULARITIES
from moekit.nn.mixers import ATTENTIONS
from moekit.nn.moment import Moment
from moekit.nn.parts import Spec, fits, make, wanted
from moekit.nn.schedule import COURSES, Schedule
from moekit.nn.scorers import SCORERS
from moekit.nn.selectors import SELECTORS
from moekit.nn.sublayers import FEED_FORWARDS
from moekit.nn.weighers import WEIGHERS
from moekit.nn.wiring import WIRINGS

E = 8
SITE = Site(hidden_size=6, intermediate_size=4, num_experts=E, top_k=2)
TABLES = [
    *(ACTIVATIONS, BALANCES, KINDS, SCORERS, SELECTORS, WEIGHERS, BANKS, BLOCKS, DEPTHS, GRANULARITIES),
    *(ATTENTIONS, COURSES, FEED_FORWARDS, WIRINGS, {"": Correction}),
]
OPTIONS = [
    (table, kind, option.name, option.annotation)
    for table in TABLES
    for kind, part in table.items()
    for option in inspect.signature(part, eval_str=True).parameters.values()
    if option.kind is option.KEYWORD_ONLY
]
ANYTHING = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text() | st.none(), min_size=1)),
    st.dictionaries(st.text(), st.integers()),
)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3], [2.0, True, "2", None, math.nan]),
        (float, [0, 2.5], [True, "2.5", math.nan, math.inf, None]),
        (bool, [True], [1, 0.0, "true"]),
        (int | None, [None, 4], [4.0, "x"]),
        (Spec, ["top-k", {"kind": "top-k"}], [3, ["top-k"]]),
        (Sequence[float], [[], [1, 2.5], (1.0,)], ["12", [1, "x"], 1.0, [math.nan]]),
        (Literal["a", "b"], ["a"], ["c", 1]),
        (dict[str, Any] | None, [None, {}], ["x", []]),
    ],
)
def test_what_fits_an_annotation(hint, good, bad):
    assert [fits(value, hint) for value in good] == [True] * len(good)
    assert [fits(value, hint) for value in bad] == [False] * len(bad)
    assert wanted(hint)


@given(option=st.sampled_from(OPTIONS), value=ANYTHING)
def test_a_value_of_the_wrong_type_names_the_part_and_the_option(option, value):
    table, kind, name, hint = option
    if fits(value, hint):
        return
    with pytest.raises(OptionError) as told:
        make("part", table, {"kind": kind, name: value})
    assert str(told.value) == f"part {kind!r} cannot have {name}={value!r}: give {wanted(hint)}"


@pytest.mark.parametrize("spec", [3, None, 0.5, ["top-k"]])
def test_a_part_is_named_by_a_word_or_a_table(spec):
    with pytest.raises(OptionError, match="give a name, or a table with the name as its kind"):
        Router(SITE, {"select": spec})


@pytest.mark.parametrize("spec", ["x", True, None, math.nan, {"weight": True}, {"weight": math.nan}, {"weight": "x"}])
def test_a_balance_needs_a_number_for_its_weight(spec):
    with pytest.raises(OptionError, match="balance 'load' needs a weight"):
        balance_term("load", spec, SITE)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"correction": {"speed": 1.0}}, "correction has no option 'speed': it has rate"),
        ({"correction": {"rate": "x"}}, "correction cannot have rate='x': give a finite number"),
        ({"correction": {"rate": -1.0}}, "rate=-1.0 of a bias correction must be positive"),
        ({"wiring": {"kind": "momentum", "mu": "x"}}, "wiring 'momentum' cannot have mu='x'"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads=3 must be a multiple of num_key"),
        ({"num_attention_heads": 2, "num_key_value_heads": 3}, "num_attention_heads=2 must be a multiple of num_key"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: give 1 or more"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: give 1 or more"),
        ({"rope_parameters": {"rope_type": "x"}}, "rope_type='x': choose one of default, dynamic"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0 of rotary positions: give a positive number"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "x", "rope_theta": 1e4}},
            "factor='x' of rotary positions: give a positive number",
        ),
        ({"modality_starts": [20, 10]}, r"modality_starts=\[20, 10\]: give rising ids of the 40 tokens there are"),
        ({"modality_starts": [-4]}, r"modality_starts=\[-4\]: give rising ids"),
        ({"modality_starts": [10, 99]}, r"modality_starts=\[10, 99\]: give rising ids"),
        ({"feed_forward": {"kind": "memory", "keys": 4, "top": 2, "width": 0}}, "width=0 of a memory: give 1 or more"),
        (
            {"attention": {"kind": "experts", "experts": 2, "k": 1, "heads": 0}},
            "heads=0 of an attention expert: give 1",
        ),
        ({"experts": {"kind": "modulated", "width": -3}}, "width=-3 of an adaptor: give 1 or more"),
        ({"experts": {"kind": "modulated", "width": 0}}, "width=0 of an adaptor: give 1 or more"),
        ({"wiring": {"kind": "adam-momentum", "eps": -1.0}}, "eps=-1 of Adam must be positive"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"head_dim": 0}, "head_dim=0: give 2 or more"),
        ({"num_attention_heads": 64}, "head_dim=0: give 2 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: give 1 or more"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0: give 1 or more"),
        ({"shared_expert_intermediate_size": -4}, "shared_expert_intermediate_size=-4: give 0 or more"),
        ({"vocab_size": 0}, "vocab_size=0: give 1 or more"),
        ({"hidden_act": "nope"}, "hidden_act='nope' is not known: choose one of gelu"),
        ({"dense_layers": [7]}, r"dense_layers=\[7\]: the 2 layers have the numbers from 0 to 1"),
        ({"dense_layers": [-1]}, r"dense_layers=\[-1\]"),
        ({"pad_token_id": -2}, "pad_token_id=-2 is not among the 40 tokens"),
        ({"router": {"activation": "identity"}}, "weigh by 'chosen', or by .kind = \"scores\", normalise = false"),
    ],
)
def test_configurations_of_no_model(fields, said):
    with pytest.raises(OptionError, match=said):
        tiny(**fields)


@given(name=st.sampled_from(sorted(MoekitConfig.__dataclass_fields__)), value=ANYTHING)
def test_a_field_of_the_wrong_type_is_told_by_its_name(name, value):
    hint = MoekitConfig.__dataclass_fields__[name].type
    if name not in MoekitConfig.__annotations__ or fits(value, hint):
        return
    with pytest.raises(Exception, match=name):  # what transformers' strict configurations raise
        MoekitConfig(**{name: value})


@given(p=st.floats())
def test_p_is_more_than_0_and_at_most_1(p):
    if 0 < p <= 1:
        assert Router(SITE, {"select": {"kind": "top-p", "p": p}}).selector.p == p
    else:
        with pytest.raises(OptionError, match="p="):
            Router(SITE, {"select": {"kind": "top-p", "p": p}})


@pytest.mark.parametrize("kind", ["top-p", "threshold", "support"])
@given(most=st.integers(-3, E + 3))
def test_the_most_that_a_token_uses(kind, most):
    spec = {"kind": kind, "most": most}
    if 1 <= most <= E:
        assert Router(SITE, {"select": spec}).selector.most == most
    else:
        with pytest.raises(OptionError, match=f"most={most} of {E} experts: give 1 to {E}"):
            Router(SITE, {"select": spec})


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
@given(k=st.integers(-3, E + 3))
def test_k_is_1_to_the_number_of_experts_whoever_sets_it(kind, k):
    made = Router(SITE, {"select": kind}).selector
    if 1 <= k <= E:
        made.k = k
        assert made(torch.rand(5, E), None).shape == (5, k)
    else:
        with pytest.raises(OptionError, match=f"{k} among {E} experts: give 1 to {E}"):
            made.k = k
        assert made.k == 2


@given(experts=st.integers(1, 12), groups=st.integers(-2, 13), k=st.integers(-2, 13))
def test_groups_divide_experts_and_slots_or_are_refused(experts, groups, k):
    site = Site(hidden_size=6, intermediate_size=4, num_experts=experts)
    spec = {"kind": "grouped", "groups": groups, "k": k}
    if groups >= 1 and 1 <= k <= experts and experts % groups == k % groups == 0:
        expert = Router(site, {"select": spec}).selector(torch.rand(7, experts), None)
        assert (torch.bincount(expert.flatten() // (experts // groups), minlength=groups) == 7 * k // groups).all()
    else:
        with pytest.raises(OptionError, match=f"{groups} groups do not divide {experts} experts and .* slots evenly"):
            Router(site, {"select": spec})


@pytest.mark.parametrize("kind", ["softmax", "gumbel-softmax"])
@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_is_positive(kind, temperature):
    made = Router(SITE, {"activation": {"kind": kind, "temperature": 0.5}}).activation
    with pytest.raises(OptionError, match=f"temperature={temperature} of a softmax must be positive"):
        made.temperature = temperature
    with pytest.raises(OptionError, match="must be positive"):
        Router(SITE, {"activation": {"kind": kind, "temperature": temperature}})


MODEL = tiny(num_experts=E, correction={"rate": 0.01})
GATES = "model.layers.*.mlp.gate"
SHARES = st.floats(-0.5, 1.5) | st.sampled_from([0.0, 0.5, 1.0])


@given(
    kind=st.sampled_from(["linear", "exponential", "cosine"]),
    start=st.integers(-1, E + 2) | st.floats(-1, E + 2),
    end=st.integers(-1, E + 2) | st.floats(-1, E + 2),
    begin=SHARES,
    until=SHARES,
)
def test_a_course_keeps_k_among_the_experts_or_is_refused(kind, start, end, begin, until):
    course = {"kind": kind, "start": start, "end": end, "begin": begin, "until": until}
    fit = 0 <= begin <= until <= 1 and all(1 <= round(k) <= E for k in (start, end)) and min(start, end) > 0
    if not fit:
        with pytest.raises(OptionError):
            Schedule(MODEL, f"{GATES}.selector.k", course)
        return
    schedule = Schedule(MODEL, f"{GATES}.selector.k", course)
    taken = []
    for step in range(11):
        schedule.apply(Moment(step, 10))
        taken += [layer.mlp.gate.selector.k for layer in MODEL.model.layers]
    assert all(type(k) is int and 1 <= k <= E for k in taken)
    assert taken[-1] == round(end)
    assert taken in (sorted(taken), sorted(taken, reverse=True))


@given(values=st.lists(st.integers(0, E + 1), max_size=4), at=st.lists(SHARES, max_size=3))
def test_steps_are_refused_or_taken_one_after_the_other(values, at):
    course = {"kind": "steps", "values": values, "at": at}
    fit = len(values) == len(at) + 1 and at == sorted(at) and all(0 <= share <= 1 for share in at)
    if not fit or not all(1 <= k <= E for k in values):
        with pytest.raises(OptionError):
            Schedule(MODEL, f"{GATES}.selector.k", course)
        return
    schedule = Schedule(MODEL, f"{GATES}.selector.k", course)
    schedule.apply(Moment(10, 10))
    assert MODEL.model.layers[0].mlp.gate.selector.k == values[-1]


@given(own=st.floats(-0.5, 1.5), begin=SHARES, until=SHARES)
def test_a_pool_grows_from_its_share_to_all_or_is_refused(own, begin, until):
    course = {"kind": "pool", "own": own, "begin": begin, "until": until}
    if not (0 < own <= 1 and 0 <= begin <= until <= 1):
        with pytest.raises(OptionError, match="share"):
            Schedule(MODEL, f"{GATES}.pool", course)
        return
    gate, drawn = MODEL.model.layers[0].mlp.gate, Schedule(MODEL, f"{GATES}.pool", course).course
    pools = [drawn(Moment(step, 10), gate) for step in range(11)]
    sizes = [E if pool is None else int(pool.sum()) for pool in pools]
    assert sizes == sorted(sizes)
    assert sizes[-1] == E


@pytest.mark.parametrize(
    ("target", "course", "said"),
    [
        ("selector.k", {"kind": "linear", "start": 9, "end": 2}, "top-k of 9 among 8 experts: give 1 to 8"),
        ("selector.k", {"kind": "linear", "start": 0, "end": 2}, "top-k of 0 among 8 experts: give 1 to 8"),
        ("selector.k", {"kind": "draw", "values": [2, 9]}, "top-k of 9 among 8 experts"),
        ("selector.k", {"kind": "steps", "values": ["a", 2], "at": [0.5]}, "gives 'a', and k is of type int"),
        ("selector.k", {"kind": "steps", "values": [True, 2], "at": [0.5]}, "gives True, and k is of type int"),
        ("selector.k", {"kind": "linear", "start": "x", "end": 2}, "course 'linear' cannot have start='x'"),
        ("selector.k", {"kind": "steps", "values": [1, 2], "at": ["x"]}, "course 'steps' cannot have at="),
        ("pool", {"kind": "linear", "start": 1, "end": 2}, "pool has no value that 1 could follow"),
        ("pool", {"kind": "draw", "values": [4, 8]}, "pool has no value that 4 could follow"),
        ("pool", {"kind": "steps", "values": [[True], [False]], "at": [0.5]}, r"pool has no value that \[True\] could"),
        ("selector.k", {"kind": "pool", "own": 0.5}, "candidates are drawn for a router's pool, not for k"),
        ("selector.k", {"kind": "candidates", "sizes": [2]}, "candidates are drawn for a router's pool, not for k"),
        ("top_k", {"kind": "linear", "start": 1, "end": 2}, "Router.top_k cannot be set"),
        ("selector.forward", {"kind": "linear", "start": 1, "end": 2}, "TopK.forward cannot be set"),
        ("activation.temperature", {"kind": "linear", "start": 1, "end": 0}, "temperature=0 of a softmax must be pos"),
    ],
)
def test_what_a_schedule_cannot_set(target, course, said):
    with pytest.raises(OptionError, match=said):
        Schedule(MODEL, f"{GATES}.{target}", course)


def test_a_course_by_way_of_a_k_that_no_group_has():
    model = tiny(num_experts=E, num_experts_per_tok=4, router={"select": {"kind": "grouped", "groups": 2}})
    with pytest.raises(OptionError, match="2 groups do not divide 8 experts and 3 slots evenly"):
        Schedule(model, f"{GATES}.selector.k", {"kind": "linear", "start": 2, "end": 4})
    Schedule(model, f"{GATES}.selector.k", {"kind": "steps", "values": [2, 4], "at": [0.5]})


@pytest.mark.parametrize(
    ("select", "attribute", "values", "said"),
    [
        ({"kind": "grouped", "groups": 2}, "groups", [2, 3], "3 groups do not divide 8 experts and their slots evenly"),
        ({"kind": "grouped", "groups": 2}, "groups", [2, 4], "4 groups do not divide 8 experts and their slots evenly"),
        ({"kind": "expert-choice", "share": 0.5}, "share", [0.5, 0.0], "share=0.0 of a sequence's tokens: give more"),
        ({"kind": "expert-choice", "share": 0.5}, "most", [8, 9], "most=9 of 8 experts: give 1 to 8"),
        ("percentile", "share", [0.5, 1.0], "share=1.0 of a percentile: give 0 to below 1"),
        ("top-p", "p", [0.4, 1.5], "p=1.5 is a share of the probability: give more than 0 and at most 1"),
    ],
)
def test_what_a_schedule_makes_of_a_selector(select, attribute, values, said):
    model = tiny(num_experts=E, router={"select": select})
    with pytest.raises(OptionError, match=said):
        Schedule(model, f"{GATES}.selector.{attribute}", {"kind": "steps", "values": values, "at": [0.5]})


@pytest.mark.parametrize(
    ("attribute", "values", "said"),
    [
        ("passes", [5, 0], "passes=0 of a calibrated router: a deviation needs 2 or more"),
        ("dropout", [0.1, 1.0], "dropout=1.0 of a router: give 0 to below 1"),
        ("floor", [0.1, 0.0], "floor=0.0 of a calibrated router must be positive"),
    ],
)
def test_what_a_schedule_makes_of_a_calibrated_scorer(attribute, values, said):
    model = tiny(router={"score": "calibrated"})
    with pytest.raises(OptionError, match=said):
        Schedule(model, f"{GATES}.scorer.{attribute}", {"kind": "steps", "values": values, "at": [0.5]})


def test_a_rate_that_a_schedule_makes_none_of():
    with pytest.raises(OptionError, match="rate=0 of a bias correction must be positive"):
        Schedule(MODEL, "model.layers.*.mlp.correction.rate", {"kind": "linear", "start": 1e-3, "end": 0})
