"""The load-balancing loss over groups of experts, as of one device each."""

import pytest
import torch

from moekit.contract import Context, Routing
from moekit.errors import OptionError
from moekit.nn.balance import Load, Seen
from moekit.nn.config import Site
from moekit.nn.router import Router

E, K, T = 6, 2, 40
SITE = Site(hidden_size=8, intermediate_size=4, num_experts=E, top_k=K)


def seen(logits, k=K, sequence=None):
    expert = logits.topk(k, dim=1).indices
    routing = Routing(expert, torch.full(expert.shape, 1 / k), logits)
    return Seen(torch.zeros(len(logits), 8), routing, Router(SITE), None, Context(sequence=sequence))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_it_is_the_sum_over_devices(groups):
    logits = torch.randn(T, E)
    view = seen(logits)
    frequency = view.chosen_TE.sum(0) * E / (K * T)  # 1 at balance
    mass = view.probability_TE.mean(0)
    by_device = zip(frequency.chunk(groups), mass.chunk(groups), strict=True)
    expected = sum(f.mean() * p.sum() for f, p in by_device)
    torch.testing.assert_close(Load(SITE, groups=groups)(view), expected)
    if groups == E:
        torch.testing.assert_close(Load(SITE)(view), expected)


def test_even_devices_cost_one_however_uneven_their_experts():
    logits = torch.full((T, E), -9.0)
    logits[:, [0, 3]] = 9.0
    torch.testing.assert_close(Load(SITE, groups=2)(seen(logits)), torch.tensor(1.0))
    assert Load(SITE)(seen(logits)) > 2.9


def test_over_sequences():
    logits = torch.randn(T, E)
    rows = torch.arange(T) // (T // 2)
    halves = [Load(SITE, groups=3)(seen(logits[rows == row])) for row in (0, 1)]
    found = Load(SITE, groups=3, scope="sequence")(seen(logits, sequence=rows))
    torch.testing.assert_close(found, torch.stack(halves).mean())


def test_uniform_probabilities_cost_one_for_any_load():
    logits = torch.zeros(T, E)
    for load in (logits, logits + torch.tensor([1e-7, 0, 0, 0, 0, 0])):
        torch.testing.assert_close(Load(SITE)(seen(load, k=1)), torch.tensor(1.0))


def test_groups_that_do_not_divide():
    with pytest.raises(OptionError, match="4 groups do not divide 6 choices evenly"):
        Load(SITE, groups=4)
