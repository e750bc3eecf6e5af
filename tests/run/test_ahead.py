"""What predictors are told in a running model is what a replay of its trace tells them."""

import pytest
import torch

from moekit.checkpoint import Checkpoint
from moekit.profile.trace import record
from moekit.run import load, paging
from moekit.run.policy import policy
from moekit.run.predict import Predictor, predictor
from moekit.run.replay import replay

PROMPTS = [torch.randint(32, 120, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5)]


class Noted(Predictor):
    """Keeps what another predictor was asked and said."""

    def __init__(self, inner):
        self.inner, self.said = inner, []

    def reset(self):
        self.said.append("reset")
        self.inner.reset()

    def observe(self, layer, experts):
        self.inner.observe(layer, experts)

    def predict(self, layer, signal, horizon):
        found = self.inner.predict(layer, signal, horizon)
        self.said.append((layer, found))
        return found


@pytest.fixture(scope="module")
def model():
    opened = load(Checkpoint.open("moekit:mini"))
    yield opened
    paging(opened).close()


@pytest.fixture(scope="module")
def seen(model):
    return record(model, PROMPTS, 3)


def made(name, model, seen):
    if name == "path":
        from moekit.run._predictors_path import PathPredictor, train_path

        return PathPredictor(train_path(seen, steps=8), seen.num_experts)
    return predictor(name, model=model, seen=seen)


@pytest.mark.parametrize("name", ["path", "token-table", "frequency", "previous-token"])
def test_predictions_are_those_of_a_replay(model, seen, name):
    served = paging(model)
    served.predictor, served.width, served.horizon = Noted(made(name, model, seen)), 2, 2
    assert (record(model, PROMPTS, 3).expert == seen.expert).all()
    live = served.predictor.said
    served.predictor, served.width = None, 0
    again = Noted(made(name, model, seen))
    replay(seen, policy("lru"), sum(seen.num_experts), again, width=2, horizon=2)
    assert live == again.said
    assert any(ranking for one in live if one != "reset" and one[0] == -1 for ranking in one[1])


def test_what_is_foreseen_before_the_first_layer_is_fetched(model, seen):
    served = paging(model)
    served.store.clear(policy("lru"))
    served.predictor, served.width = made("token-table", model, seen), 3
    first = {expert for expert, _ in served.predictor.predict(-1, signal(PROMPTS[0]), 1)[0][:3]}
    with torch.no_grad():
        model(input_ids=PROMPTS[0][None], use_cache=False)
    served.predictor, served.width = None, 0
    assert {(0, expert) for expert in first} <= set(served.store.resident())
    assert served.store.counters.prefetch_bytes > 0


def signal(token):
    from moekit.run import Signal

    return Signal(token=token.numpy())


def test_padding_is_left_out(model, seen):
    served = paging(model)
    served.predictor, served.width = made("token-table", model, seen), 1
    ids, mask = torch.tensor([[0, 0, 40], [50, 51, 52]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    served.predictor, served.width = None, 0
    assert served.signal.token.tolist() == [40, 50, 51, 52]
    assert served.signal.sequence.tolist() == [0, 1, 1, 1]
    assert sorted(served.signal.routing) == list(range(len(served.blocks)))
