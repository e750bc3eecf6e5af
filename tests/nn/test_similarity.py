"""Sequences of similar labels routed alike: the term against the sum over pairs, and its ends."""

import pytest
import torch
import torch.nn.functional as F
from wholes import lives

from moekit.contract import Context, Routing
from moekit.errors import OptionError
from moekit.nn import Router, Seen, Site
from moekit.nn.balance import balance_term
from moekit.nn.similarity import Similarity

E = 4
SITE = Site(hidden_size=3, intermediate_size=2, num_experts=E)


def told(logits, sequence, task, padding=None):
    routing = Routing(logits.argmax(1, keepdim=True), torch.ones(len(logits), 1), logits)
    context = Context(sequence=sequence, task=task, padding=padding)
    return Seen(torch.zeros(len(logits), 3), routing, Router(SITE), None, context)


def test_it_is_the_mean_over_pairs():
    logits, sequence = torch.randn(12, E), torch.arange(12) // 3
    task = torch.tensor([5, 5, 9, 5, 5, 5, 9, 9, 9, 2, 2, 5])
    mean = [logits.softmax(-1)[sequence == row].mean(0) for row in range(4)]
    label = [torch.stack([(task[sequence == row] == name).float().mean() for name in (2, 5, 9)]) for row in range(4)]
    expected = torch.stack(
        [
            (F.cosine_similarity(mean[i], mean[j], dim=0) - F.cosine_similarity(label[i], label[j], dim=0)).abs()
            for i in range(4)
            for j in range(4)
            if i != j
        ]
    ).mean()
    torch.testing.assert_close(Similarity(SITE)(told(logits, sequence, task)), expected)


@pytest.mark.parametrize(
    ("experts", "tasks", "value"),
    [
        ([0, 0, 1, 1], [3, 3, 8, 8], 0.0),  # a label, an expert: whichever
        ([2, 2, 0, 0], [3, 3, 8, 8], 0.0),
        ([0, 0, 0, 0], [3, 3, 8, 8], 8 / 12),  # four of six pairs should be apart
        ([0, 1, 2, 3], [7, 7, 7, 7], 1.0),
        ([1], [3], 0.0),
    ],
)
def test_ends(experts, tasks, value):
    logits = 200 * torch.eye(E)[experts].repeat_interleave(2, 0)
    sequence, task = torch.arange(len(logits)) // 2, torch.tensor(tasks).repeat_interleave(2)
    assert float(Similarity(SITE)(told(logits, sequence, task))) == pytest.approx(value, abs=1e-6)


def test_padding_counts_nowhere_and_a_sequence_of_padding_alone_is_finite():
    logits, sequence, task = torch.randn(9, E), torch.arange(9) // 3, torch.tensor([1, 1, 4, 4, 4, 4, 2, 2, 2])
    padding = torch.tensor([False, False, True] + [False] * 6)
    term, real = Similarity(SITE), ~padding
    short = told(logits[real], sequence[real], task[real])
    torch.testing.assert_close(term(told(logits, sequence, task, padding)), term(short))
    logits.requires_grad_()
    term(told(logits, sequence, task, sequence == 1)).backward()
    assert logits.grad.isfinite().all()


def test_minimising_it_brings_like_together():
    logits, sequence, task = torch.randn(8, E), torch.arange(8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    logits.requires_grad_()
    before = Similarity(SITE)(told(logits, sequence, task))
    before.backward()
    assert Similarity(SITE)(told(logits.detach() - 0.5 * logits.grad, sequence, task)) < before


def test_in_a_model(tmp_path):
    task = torch.tensor([[0] * 12, [1] * 12])
    lives(tmp_path, inputs={"task_ids": task}, balance={"similarity": 0.1})


def test_labels_that_are_not_there():
    with pytest.raises(OptionError, match="routing by task needs task_ids with the input"):
        Similarity(SITE)(told(torch.zeros(2, E), torch.arange(2), None))
    with pytest.raises(OptionError, match="labels called 'x': choose one of modality, task"):
        balance_term("similarity", {"weight": 0.1, "label": "x"}, SITE)
