"""Stand-ins on real pages: exact where everything is asked for as it is, and otherwise what the parts add up to."""

import miniatures
import numpy as np
import pytest
import torch

from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import OptionError
from moekit.run import answer, load, paging
from moekit.run._stand_in import HIGH, LOW, SKIP, TwoPools, divergence
from moekit.run.hobbit import Hobbit
from moekit.run.policy import policy
from moekit.stream import LoadedModel


def packed(source, folder, *methods):
    from moekit.compress import sequence
    from moekit.plan import apply, make_plan

    apply(source, make_plan(sequence(methods), source, None, None), folder, format="moekit")
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Checkpoint.open(miniatures.plain(tmp_path_factory.mktemp("plain") / "model"))


@pytest.fixture(scope="module")
def low(source, tmp_path_factory):
    return packed(source, tmp_path_factory.mktemp("low") / "model", "rtn:bits=4")


@pytest.fixture
def opened():
    models = []

    def make(source, low, read, experts=None, copies=0):
        models.append(load(source, stand_in=low, read=read))
        store = paging(models[-1]).store
        half = len(store.layers) // 2
        if experts is not None:
            store.resize(experts * max(store.layers[0].charge) + copies * max(store.layers[half].charge))
        return models[-1]

    yield make
    for model in models:
        paging(model).close()


IDS = torch.randint(5, 90, (1, 12), generator=torch.Generator().manual_seed(1))


def always(level):
    return lambda expert_TK, weight_TK: {int(e): level for e in np.unique(expert_TK) if e >= 0}


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def resident(checkpoint):
    model = LoadedModel.load(checkpoint).model
    if checkpoint.config.get("quantization_config") is None:
        model.set_experts_implementation("moekit")
    return model


@pytest.mark.parametrize("experts", [None, 1, 5])
def test_all_high_is_bit_identical_and_reads_no_copy(opened, source, low, experts):
    model = opened(source, low, always(HIGH), experts)
    assert torch.equal(logits(model), logits(resident(source)))
    half = len(blocks(model))
    assert all(layer < half for layer, _ in paging(model).store.resident())
    assert paging(model).stand_ins.uses[LOW] == 0


def test_all_low_is_the_packed_model_until_experts_are_resident(opened, source, low):
    model = opened(source, low, always(LOW))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(model), logits(resident(low)), **close)
    served = paging(model)
    half = len(served.blocks)
    assert all(layer >= half for layer, _ in served.store.resident())
    assert not torch.allclose(logits(model), logits(resident(source)), **close)
    # once the experts themselves are there, no rule can make a copy stand in for them
    served.stand_ins.read = always(HIGH)
    logits(model)
    served.stand_ins.read = always(LOW)
    assert torch.equal(logits(model), logits(resident(source)))


def test_a_packed_model_may_have_copies_of_the_same_origin(opened, source, low, tmp_path):
    eight = packed(source, tmp_path / "eight", "rtn:bits=8")
    model = opened(eight, low, always(LOW))
    torch.testing.assert_close(logits(model), logits(resident(low)), rtol=1e-4, atol=1e-5)
    paging(model).stand_ins.exact = True
    assert torch.equal(logits(model), logits(resident(eight)))


def test_what_is_skipped_adds_nothing(opened, source, low):
    model = opened(source, low, always(SKIP))
    plain = resident(source)
    for block in blocks(plain):
        block.experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    torch.testing.assert_close(logits(model), logits(plain))
    assert paging(model).store.counters.demand_bytes == 0
    # a copy that is there is better than nothing
    paging(model).stand_ins.read = always(LOW)
    first = logits(model)
    paging(model).stand_ins.read = always(SKIP)
    assert torch.equal(logits(model), first)


def test_both_parts_are_added(opened, source, low):
    """One expert of a layer as it is, the others as copies: the sum of what each model's own experts give."""
    model = opened(source, low, lambda index, weight: {int(e): HIGH if e == 2 else LOW for e in np.unique(index)})
    whole, small, mine = blocks(resident(source))[0], blocks(resident(low))[0], blocks(model)[0]
    draw = torch.Generator().manual_seed(3)
    x_TH = torch.randn(4, whole.hidden_size, generator=draw)
    index = torch.tensor([[2, 0], [1, 2], [3, 1], [2, 3]])
    weight = torch.rand(4, 2, generator=draw)
    with torch.no_grad():
        got = mine.experts(x_TH, index, weight)
        own = (index == 2).float() * weight
        expected = whole.experts(x_TH, index, own) + small.experts(x_TH, index, weight - own)
    torch.testing.assert_close(got, expected)
    assert paging(model).stand_ins.uses == {"there": 0, HIGH: 1, LOW: 3, SKIP: 0}


def test_fewer_bytes_are_read_and_the_budget_holds(opened, source, low):
    read = {}
    for name, rule in (("exact", always(HIGH)), ("hobbit", Hobbit(high=0.4).read)):
        model = opened(source, low, rule, experts=4, copies=2)
        store = paging(model).store
        answer(model, IDS, 10)
        assert store.held_bytes <= store.budget
        read[name] = store.counters.demand_bytes
    assert 0 < read["hobbit"] < read["exact"]


def test_divergence_is_zero_where_nothing_stands_in_and_says_so_where_it_does(opened, source, low):
    model = opened(source, low, always(HIGH), experts=3)
    found = divergence(model, paging(model).stand_ins, IDS, 4)
    assert (found.kl, found.agree, found.tokens) == (0.0, 1.0, 8)
    model = opened(source, low, always(SKIP))
    served = paging(model)
    assert divergence(model, served.stand_ins, IDS, 4).kl > 0
    assert served.stand_ins.exact is False
    with pytest.raises(OptionError, match=r"a prompt of 12 tokens out of 12: expected some before and some after"):
        divergence(model, served.stand_ins, IDS, 12)


def test_answers_with_stand_ins_have_no_bound_of_their_own(opened, source, low):
    _, cost = answer(opened(source, low, Hobbit(high=0.4).read, experts=4, copies=2), IDS, 4)
    assert cost.bound is None


def test_only_copies_of_this_model_stand_in(source, low, tmp_path):
    other = Checkpoint.open(miniatures.plain(tmp_path / "other", seed=7))
    biased = packed(other, tmp_path / "of-other", "rtn:bits=4")
    with pytest.raises(OptionError, match="was made of another model than"):
        load(source, stand_in=biased, read=always(LOW))
    with pytest.raises(OptionError, match=r"has no plan.json that says what it was made of"):
        load(source, stand_in=source, read=always(LOW))
    dropped = packed(source, tmp_path / "dropped", "random:keep=0.5", "rtn:bits=4")
    with pytest.raises(OptionError, match=r"does not hold all \d+ experts of .* packed, each in its place"):
        load(source, stand_in=dropped, read=always(LOW))
    for options in ({"stand_in": low}, {"read": always(LOW)}, {"stand_in": low, "read": always(LOW), "ahead": 2}):
        with pytest.raises(OptionError, match=r"stand-ins need a checkpoint .* and a rule .* nothing read ahead"):
            load(source, **options)


def test_two_pools_keep_apart():
    pools = TwoPools(policy("lru:pool=global"), 2)
    for layer, expert in ((0, 0), (2, 0), (0, 1), (3, 1)):
        pools.routed(layer, [expert], None)
        pools.admitted((layer, expert))
    there = [(0, 0), (2, 0), (0, 1), (3, 1)]
    assert pools.victim(there, set(), (1, 5)) in {(0, 0), (0, 1)}
    assert pools.victim(there, set(), (2, 5)) in {(2, 0), (3, 1)}
    assert pools.victim(there, {(0, 0), (0, 1)}, (1, 5)) in {(2, 0), (3, 1)}  # its own pool is all in use
    assert pools.victim([(2, 0), (3, 1), (3, 0)], set(), (0, 0))[0] >= 2  # below its share it takes from the other
    assert pools.victim([(0, 0)], {(0, 0)}, (1, 1)) is None
