"""The store: what is asked for is there, the budget holds, and every trouble is told to whoever waits."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import BudgetError, CheckpointError
from moekit.run.policy import policies, policy
from moekit.run.store import ExpertStore


class Shelf:
    """One layer of pretended experts: knows which are kept and filled, and can be told to fail or to wait."""

    def __init__(self, name="layer", experts=8, charge=10):
        self.name, self.num_experts = name, experts
        self.charge = self.stored_bytes = [charge] * experts
        self.unit = charge
        self.kept, self.filled, self.reads = set(), set(), []
        self.fail, self.gate = set(), None

    def keep(self, expert):
        assert expert not in self.kept
        self.kept.add(expert)

    def drop(self, expert):
        self.kept.remove(expert)
        self.filled.discard(expert)

    def fill(self, expert):
        if self.gate is not None:
            assert self.gate.wait(10)
        if expert in self.fail:
            raise CheckpointError(f"the disk failed on {expert}")
        assert expert in self.kept
        self.reads.append(expert)
        self.filled.add(expert)


@pytest.fixture
def opened():
    stores = []

    def make(layers, budget, name="lru", threads=2):
        stores.append(ExpertStore(layers, budget, policy(name), threads))
        return stores[-1]

    yield make
    for store in stores:
        for layer in store.layers:
            if layer.gate is not None:
                layer.gate.set()
        store.close()


def serve(store, layer, experts, most=None):
    store.begin(layer, experts)
    most = most or store.most(layer)
    for start in range(0, len(experts), most):
        part = experts[start : start + most]
        store.need(layer, part)
        assert set(part) <= store.layers[layer].filled
    store.end()


@settings(max_examples=40)
@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 7), min_size=1)), max_size=25),
    budget=st.integers(10, 200),
    name=st.sampled_from(policies()),
    ahead=st.lists(st.integers(0, 7), max_size=3),
)
def test_whatever_is_needed_is_there_and_the_budget_holds(requests, budget, name, ahead):
    layers = [Shelf() for _ in range(3)]
    store = ExpertStore(layers, budget, policy(name), threads=2)
    try:
        for layer, experts in requests:
            serve(store, layer, sorted(experts))
            store.prefetch((layer + 1) % 3, ahead)
            assert store.held_bytes <= budget
            assert sum(len(shelf.kept) for shelf in layers) * 10 <= budget
        counters = store.counters
        assert counters.requests == sum(len(experts) for _, experts in requests)
        assert counters.hits + counters.late + counters.misses == counters.requests
    finally:
        store.close()
    assert all(not shelf.kept for shelf in layers)


def test_hits_misses_and_bytes_are_counted(opened):
    store = opened([Shelf()], 30)
    for experts in ([0, 1], [1, 2], [0], [3], [1]):
        serve(store, 0, experts)
    counters = store.counters
    assert (counters.requests, counters.hits, counters.misses) == (7, 2, 5)
    assert counters.demand_bytes == 50
    assert counters.hit_rate == pytest.approx(2 / 7)


def test_prefetched_experts_are_hits_and_wasted_ones_are_counted(opened):
    shelf = Shelf()
    store = opened([shelf], 20)
    store.prefetch(0, [4, 5])
    while len(store.resident()) < 2:
        pass
    serve(store, 0, [4])
    assert store.counters.hits == 1
    serve(store, 0, [6])
    serve(store, 0, [7])
    assert store.counters.prefetch_bytes == 20
    assert store.counters.useless_bytes == 10


def test_what_is_still_being_read_counts_as_late(opened):
    shelf = Shelf()
    shelf.gate = threading.Event()
    store = opened([shelf], 40)
    store.prefetch(0, [2])
    store.begin(0, [2])
    shelf.gate.set()
    store.need(0, [2])
    assert (store.counters.hits, store.counters.late, store.counters.misses) == (0, 1, 0)
    assert store.counters.stall_seconds > 0


def test_a_prefetch_that_nobody_began_makes_way(opened):
    shelf = Shelf()
    shelf.gate = threading.Event()
    store = opened([shelf], 30, threads=1)
    store.prefetch(0, [1, 2, 3])
    store.begin(0, [5, 6])
    shelf.gate.set()
    store.need(0, [5, 6])
    begun = [1] if shelf.reads[0] == 1 else []
    assert shelf.reads[: len(begun) + 2] == [*begun, 5, 6]


def test_a_prefetch_never_evicts_what_is_pinned(opened):
    store = opened([Shelf(), Shelf()], 20)
    store.begin(0, [1, 2])
    store.need(0, [1, 2])
    store.prefetch(1, [5])
    assert set(store.resident()) == {(0, 1), (0, 2)}
    store.end()


def test_more_than_fits_is_served_in_parts(opened):
    store = opened([Shelf()], 20)
    serve(store, 0, list(range(8)))
    assert store.counters.misses == 8
    assert store.most(0) == 2


def test_a_disk_that_fails_is_told_and_can_be_tried_again(opened):
    shelf = Shelf()
    shelf.fail = {3}
    store = opened([shelf], 40)
    with pytest.raises(CheckpointError, match="the disk failed on 3"):
        serve(store, 0, [2, 3])
    store.end()
    shelf.fail = set()
    serve(store, 0, [2, 3])
    assert shelf.filled == {2, 3}


def test_a_batch_that_failed_leaves_nothing_behind(opened):
    shelf = Shelf()
    shelf.fail = {1, 3, 5}
    store = opened([shelf], 40)
    with pytest.raises(CheckpointError, match="the disk failed on"):
        serve(store, 0, [1, 3, 5])
    shelf.fail = set()
    for expert in (1, 3, 5):
        serve(store, 0, [expert])


def test_a_prefetch_that_fails_is_silent_until_it_is_needed(opened):
    shelf = Shelf()
    shelf.fail = {3}
    store = opened([shelf], 40)
    store.prefetch(0, [3])
    while store.held_bytes:
        pass
    with pytest.raises(CheckpointError, match="failed on 3"):
        serve(store, 0, [3])


def test_a_smaller_budget_lets_go(opened):
    shelf = Shelf()
    store = opened([shelf], 80)
    serve(store, 0, list(range(8)))
    store.resize(20)
    assert len(shelf.kept) == 2
    serve(store, 0, [0, 5])


def test_a_budget_below_one_expert_is_refused():
    with pytest.raises(BudgetError, match="a single one takes 0 MB"):
        ExpertStore([Shelf()], 9, policy("lru"))
