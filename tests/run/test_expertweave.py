"""ExpertWeave: tokens of a mixed batch are the merged models' tokens, and memory is that of the experts there are."""

import mmap
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routings import random_trace

from moekit.bank import SILU_MUL
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.contract import PAD, Routing, weighted_sum
from moekit.errors import BudgetError, OptionError, UnsupportedModelError
from moekit.formats import DenseBank
from moekit.kernels import fused, run
from moekit.run import _adapters, _adapters_live, _virtual
from moekit.run._adapters import AdaptedLayer, Adapter
from moekit.run._adapters_live import InUseError
from moekit.run._virtual import Frames
from moekit.run.expertweave import ExpertWeave, fragmentation, memory_factor, relevance, select
from moekit.stream import LoadedModel

PAGE = mmap.PAGESIZE
EXPERTS, HIDDEN, INNER = 6, 32, 32


def bank(experts, seed, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(seed)
    up = torch.randn(experts, 2 * INNER, HIDDEN, generator=draw) / 6
    down = torch.randn(experts, HIDDEN, INNER, generator=draw) / 6
    return DenseBank(up.to(dtype), down.to(dtype), None, None, SILU_MUL)


def merged(base, experts, own):
    up, down = base.gate_up.clone(), base.down.clone()
    up[list(experts)], down[list(experts)] = own.gate_up, own.down
    return DenseBank(up, down, None, None, SILU_MUL)


def same(ours, expected):
    """Bit for bit where compiled kernels run, for fewer than 49 rows of an expert; elsewhere to float accuracy."""
    if fused.lacking() is None:
        return bool((ours == expected).all())
    return torch.allclose(ours.float(), expected.float(), rtol=2e-2, atol=2e-2)


def layer_with(replaced, dtype=torch.bfloat16, page=PAGE):
    base, frames = bank(EXPERTS, 0, dtype), Frames(page)
    layer = AdaptedLayer(base, frames, len(replaced), max(map(len, replaced), default=1))
    models = {-1: base}
    for place, experts in enumerate(replaced):
        own = bank(len(experts), 100 + place, dtype)
        layer.load(place, experts, own)
        models[place] = merged(base, experts, own)
    return layer, models, frames


@settings(max_examples=15)
@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_token_is_its_merged_models(seed, tokens, dtype):
    layer, models, _ = layer_with([(1, 4), (0, 4, 5), (3,)], dtype)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=draw).to(dtype)
    index = torch.rand(tokens, EXPERTS, generator=draw).topk(3).indices
    index[torch.rand(tokens, 3, generator=draw) < 0.1] = EXPERTS  # the sentinel of unused slots
    weight, place = torch.rand(tokens, 3, generator=draw), torch.randint(-1, 3, (tokens,), generator=draw)
    ours = layer.run(x, index, weight, place, lambda rows: rows)
    routing = Routing(torch.where(index < EXPERTS, index, PAD), weight * (index < EXPERTS))
    for one, model in models.items():
        expected = weighted_sum(run(model, x, routing), routing)
        assert same(ours[place == one], expected[place == one])


def test_an_unmapped_token_would_be_seen():
    layer, models, _ = layer_with([(1, 4)])
    x, index, weight = torch.randn(8, HIDDEN).bfloat16(), torch.full((8, 1), 4), torch.ones(8, 1)
    ours = layer.run(x, index, weight, torch.zeros(8, dtype=torch.long), lambda rows: rows)
    base = layer.run(x, index, weight, torch.full((8,), -1), lambda rows: rows)
    assert not torch.allclose(ours, base, atol=0.1)
    assert same(base, run(models[-1], x, Routing(index, weight))[:, 0])


def test_a_mixed_batch_is_one_grouped_call(monkeypatch):
    layer, _, _ = layer_with([(1, 4), (0,)])
    calls = []
    monkeypatch.setattr(_adapters, "run", lambda *args: calls.append(args) or run(*args))
    index = torch.tensor([[0], [1], [4], [0]])
    layer.run(torch.randn(4, HIDDEN), index, torch.ones(4, 1), torch.tensor([-1, 0, 0, 1]), lambda rows: rows)
    assert len(calls) == 1
    assert calls[0][2].expert.flatten().tolist() == [0, EXPERTS, EXPERTS + 1, EXPERTS + 2]


def pages_of(rows, size, page):
    return {p for row in rows for p in range(row * size // page, -(-(row + 1) * size // page))}


@pytest.mark.parametrize("page", [PAGE, 4 * PAGE])
def test_memory_is_that_of_the_experts_there_are(page):
    layer, _, frames = layer_with([(1, 4), (0, 4, 5), (3,)], page=page)
    down = 2 * HIDDEN * INNER  # half a page: neighbours share

    def expected(slots):
        return page * (len(pages_of(slots, 2 * down, page)) + len(pages_of(slots, down, page)))

    base = list(range(EXPERTS))
    full = [*base, 6, 7, 9, 10, 11, 12]
    assert layer.held == full
    assert frames.physical_bytes == expected(full)
    for _ in range(5):
        layer.evict(0)
        layer.evict(2)
        assert frames.physical_bytes == expected([*base, 9, 10, 11])
        layer.load(2, (3,), bank(1, 102))
        layer.load(0, (1, 4), bank(2, 100))
        assert frames.physical_bytes == expected(full)
    for place in range(3):
        layer.evict(place)
    assert frames.physical_bytes == expected(base)
    assert bool((layer.slot_PE == torch.arange(EXPERTS)).all())


def test_without_memory_nothing_has_changed(monkeypatch):
    layer, _, frames = layer_with([(1, 4)])
    before, taken = frames.physical_bytes, []
    allocate = _virtual.os.posix_fallocate

    def third_fails(*args):
        taken.append(args)
        if len(taken) == 3:
            raise OSError(12, "Cannot allocate memory")
        allocate(*args)

    layer.evict(0)
    empty = frames.physical_bytes
    with monkeypatch.context() as patch:
        patch.setattr(_virtual.os, "posix_fallocate", third_fails)
        with pytest.raises(BudgetError, match="Cannot allocate"):
            layer.load(0, (1, 4), bank(2, 100))
    assert frames.physical_bytes == empty
    layer.load(0, (1, 4), bank(2, 100))
    assert frames.physical_bytes == before


# -- a live model


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open("moekit:mini")


def tuned(model, experts, seed):
    """An adapter that replaces ``experts`` of every layer by noisy copies."""
    draw, banks = torch.Generator().manual_seed(seed), []
    for block in blocks(model):
        own = block.bank()
        up, down = (t[list(experts)] for t in (own.gate_up, own.down))
        noisy = (t + 0.3 * t.std() * torch.randn(t.shape, generator=draw) for t in (up, down))
        banks.append(DenseBank(*noisy, None, None, own.activation))
    return Adapter((tuple(experts),) * len(banks), tuple(banks))


@pytest.fixture(scope="module")
def woven(checkpoint):
    model = LoadedModel.load(checkpoint, dtype=torch.float32).model
    adapters = {"a": tuned(model, (0, 3, 7), 1), "b": tuned(model, (3, 15), 2)}
    weave = ExpertWeave(adapters=2, most=3).open(model)
    for name, adapter in adapters.items():
        weave.load(name, adapter)
    return model, weave, adapters


@torch.no_grad()
def test_sequences_of_one_batch_use_their_own_adapters(woven, checkpoint):
    model, weave, adapters = woven
    ids = torch.randint(32, 120, (5, 8), generator=torch.Generator().manual_seed(3))
    names = ["a", None, "b", "a", "b"]
    with weave.serving(names):
        mixed = model(ids).logits
    outside = model(ids).logits
    plain = LoadedModel.load(checkpoint, dtype=torch.float32).model
    for name in (None, "a", "b"):
        other = LoadedModel.load(checkpoint, dtype=torch.float32).model
        for number, block in enumerate(blocks(other) if name else []):
            adapter = adapters[name]
            block.put(merged(block.bank(), adapter.experts[number], adapter.banks[number]))
        stock = other(ids).logits
        rows = [i for i, one in enumerate(names) if one == name]
        assert torch.allclose(mixed[rows], stock[rows], rtol=1e-4, atol=1e-4)
        ExpertWeave(adapters=1, most=1).open(other)
        assert same(mixed[rows], other(ids).logits[rows])
        if name:
            assert not torch.allclose(mixed[rows], outside[rows], atol=1e-2)
    assert torch.allclose(outside, plain(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_profiles_see_the_numbers_of_the_base(woven):
    model, weave, _ = woven
    seen = []
    with weave.blocks[2].observe(lambda found: seen.append(found.routing.expert)), weave.serving(["a", "b"]):
        model(torch.randint(32, 120, (2, 8)))
    assert int(seen[0].max()) < weave.blocks[2].num_experts


def test_an_adapter_at_work_stays(woven):
    _, weave, adapters = woven
    with weave.serving(["a", None, "a"]):
        with pytest.raises(InUseError, match="adapter 'a' is computing 2 sequences: evict it when they are done"):
            weave.evict("a")
        weave.evict("b")
    before = weave.frames.physical_bytes
    weave.load("b", adapters["b"])
    weave.evict("a")
    assert weave.loaded == ["b"]
    weave.load("a", adapters["a"])
    expert = 4 * 3 * 192 * 64  # whole pages
    assert weave.frames.physical_bytes - before == 8 * 2 * expert


@torch.no_grad()
def test_errors(woven, monkeypatch):
    model, weave, adapters = woven
    own = adapters["a"]
    with pytest.raises(OptionError, match="no adapter 'c' is loaded: there are a, b"), weave.serving(["c"]):
        pass
    with pytest.raises(OptionError, match="no adapter 'c'"):
        weave.evict("c")
    with pytest.raises(OptionError, match="an adapter 'a' already"):
        weave.load("a", own)
    with pytest.raises(OptionError, match="all 2 places hold an adapter: evict one of a, b"):
        weave.load("c", own)
    with weave.serving(["a", "b"]), pytest.raises(OptionError, match="5 tokens came for the 2 sequences"):
        model(torch.zeros(1, 5, dtype=torch.long))
    weave.evict("b")
    with pytest.raises(OptionError, match=r"adapter 'c' is of 2 MoE layers, the model has 8"):
        weave.load("c", Adapter(own.experts[:2], own.banks[:2]))
    with pytest.raises(OptionError, match="replaces up to 4 experts in a layer, a place holds 3"):
        weave.load("c", tuned(model, (0, 1, 2, 3), 5))
    with pytest.raises(OptionError, match="replaces expert 16 of layer 0, which has 16"):
        weave.load("c", Adapter(((16, 1, 2),) * 8, own.banks))
    with pytest.raises(OptionError, match=r"experts of \{.*32.*\} in layer 0, the model"):
        weave.load("c", Adapter(((0,),) * 8, (bank(1, 0),) * 8))
    assert weave.loaded == ["a"]
    weave.load("b", adapters["b"])
    x = torch.randn(2, 192, requires_grad=True)
    with torch.enable_grad(), pytest.raises(OptionError, match="no backward"):
        blocks(model)[0].experts(x, torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4))
    with pytest.raises(OptionError, match="0 adapters of at most 3 experts"):
        ExpertWeave(adapters=0, most=3).open(model)
    monkeypatch.setattr(_adapters_live, "is_decorated", lambda module: False)
    with pytest.raises(UnsupportedModelError, match="adapters cannot be stacked on"):
        ExpertWeave().open(model)


def test_adapters_say_what_they_replace():
    with pytest.raises(OptionError, match=r"layer 1 of an adapter has weights of 2 experts for \[3, 3\]"):
        Adapter(((), (3, 3)), (None, bank(2, 0)))
    with pytest.raises(OptionError, match=r"layer 0 of an adapter has weights of 0 experts for \[3\]"):
        Adapter(((3,),), (None,))
    with pytest.raises(OptionError, match="experts of 1 layers, weights of 0"):
        Adapter(((),), ())
    assert Adapter(((), (1, 2)), (None, bank(2, 0))).largest == 2


# -- formulas


def test_memory_factor_is_the_papers():
    # Ten adapters whose mean experts per layer add up to 65.1, places of 13, over 64 experts: 194 / 129.1.
    assert memory_factor(64, 13, [[6.51]] * 10) == pytest.approx(1.50, abs=0.005)
    assert memory_factor(8, 3, [[3, 3], [3, 3]]) == 1
    assert fragmentation([13, 0]) == 0.5
    assert fragmentation([4, 4, 4]) == 0


@settings(max_examples=30)
@given(row=st.lists(st.integers(1, 50), min_size=2, max_size=7), p=st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]))
def test_selection_is_the_fewest_experts(row, p):
    (chosen,) = select(np.array([row], dtype=float), p)
    total = sum(row)
    assert sum(row[e] for e in chosen) >= p * total - 1e-6
    best = min(n for n in range(1, len(row) + 1) for c in combinations(row, n) if sum(c) >= p * total - 1e-6)
    assert len(chosen) == best


def test_relevance_is_gate_or_choice_shares():
    trace = random_trace(3, steps=40)
    by_gate, by_token = relevance(trace), relevance(trace, "token")
    assert by_gate.sum(1) == pytest.approx(1)
    counts = np.bincount(trace.expert[:, 0].ravel(), minlength=max(trace.num_experts))
    assert by_token[0] == pytest.approx(counts / counts.sum())
    trace.weight[:, 0, 0] *= 3  # the first slot counts for more
    heavier = np.bincount(trace.expert[:, 0].ravel(), trace.weight[:, 0].ravel(), max(trace.num_experts))
    assert relevance(trace)[0] == pytest.approx(heavier / heavier.sum())
    assert not np.allclose(relevance(trace)[0], by_token[0])
    with pytest.raises(OptionError, match=r"a share of relevance of 0: expected more than 0"):
        select(by_gate, 0)
