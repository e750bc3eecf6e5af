"""Stored patterns at run time: the task is found once per sequence, its experts come first and go last."""

import numpy as np
import pytest
import torch

from moekit.contract import Routing
from moekit.run import Signal, answer, load, paging
from moekit.run._policies_known import Pinned
from moekit.run._predictors_patterns import Retrieval, keep_patterns, winners
from moekit.run._predictors_seen import PreviousToken
from moekit.run.policy import policy

GATE_EH = torch.eye(4)


def gate(x_TH):
    logits = x_TH @ GATE_EH.T
    weight, expert = logits.topk(2)
    return Routing(expert, weight, logits)


def test_a_marker_is_the_mean_of_winning_logits():
    x_TH = torch.tensor([[3.0, 1, 0, 0], [1, 0, 0, 2], [5, 0, 0, 1]])
    assert winners(gate, x_TH).tolist() == [8 / 3, 0, 0, 2 / 3]


KEYS = {"a": np.array([4.0, 0, 0, 0]), "b": np.array([0, 0, 0, 4.0])}
EXPERTS = {"a": [[0, 1], [2, 3], [1, 0]], "b": [[3], [0], [2]]}


def signal(expert):
    return Signal(x_TH=3 * torch.eye(4)[[expert, expert]])


def test_the_nearest_task_is_found_once_per_sequence():
    pins = Pinned(policy("lru"), ())
    found = Retrieval(gate, KEYS, EXPERTS, pins)
    assert found.predict(-1, signal(0), 1) == []
    assert found.predict(0, signal(0), 1) == [[(2, 1.0), (3, 1.0)], [(1, 1.0), (0, 1.0)]]
    assert (found.task, pins.hot) == ("a", {(0, 0), (0, 1), (1, 2), (1, 3), (2, 1), (2, 0)})
    assert found.predict(0, signal(3), 1) == []  # the next token of the same sequence
    found.reset()
    assert found.predict(0, signal(3), 1) == [[(0, 1.0)], [(2, 1.0)]]
    assert (found.task, pins.hot) == ("b", {(0, 3), (1, 0), (2, 2)})


def test_otherwise_the_inner_predictor_speaks():
    inner = PreviousToken(3)
    found = Retrieval(gate, KEYS, EXPERTS, Pinned(policy("lru"), ()), inner, width=1)
    found.observe(1, [3, 2])
    found.predict(0, signal(0), 1)
    assert found.predict(0, signal(0), 1) == [[(3, 1.0)]]
    found.reset()
    assert inner.last == [()] * 3


@pytest.fixture
def model():
    opened = load("moekit:mini", policy="lru")
    yield opened
    paging(opened).close()


def test_tokens_stay_and_the_pattern_with_them(model):
    ids = torch.randint(32, 120, (1, 20), generator=torch.Generator().manual_seed(2))
    expected, _ = answer(model, ids, 8)
    served = paging(model)
    served.store.resize(served.expert_bytes // 4)
    names = [block.name for block in served.blocks]
    keys = {"near": winners(served.blocks[0].choose, embedded(model, ids)), "far": np.full(16, 50.0)}
    ordered = {task: {name: list(range(16))[:: 1 if task == "far" else -1] for name in names} for task in keys}
    found = keep_patterns(model, keys, ordered)
    assert torch.equal(answer(model, ids, 8)[0], expected)
    assert found.task == "near"
    each = len(found.experts["near"][0])
    assert each == 3  # of 4 that are due to a layer
    wanted = {(layer, 15 - i) for layer in range(len(names)) for i in range(each)}
    assert served.store.policy.hot == wanted
    kept, others = wanted & set(served.store.resident()), 13 * len(names)
    assert len(kept) / len(wanted) > 2 * (len(served.store.resident()) - len(kept)) / others


def embedded(model, ids):
    """What the first router reads."""
    seen = []
    router = paging(model).blocks[0].router_module
    hook = router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])
