"""How many tokens an expert takes at most, by kind."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import leaks, lives, tiny, tokens

from moekit.contract import PAD, Context
from moekit.errors import OptionError
from moekit.nn.capacity import Capped, arrival
from moekit.nn.parts import Site

SITE = Site(hidden_size=4, intermediate_size=4, num_experts=3, choices=5, top_k=2)


@given(st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=1, max_size=12))
def test_arrival_counts_first_slots_first_and_earlier_tokens_first(rows):
    seen, wanted = dict.fromkeys(range(-1, 5), 0), [[0, 0] for _ in rows]
    for slot in range(2):
        for token, row in enumerate(rows):
            wanted[token][slot] = seen[row[slot]]
            seen[row[slot]] += 1
    assert arrival(torch.tensor(rows), 5).tolist() == wanted


def test_capacities_by_hand():
    part = Capped(SITE, factor=1.1, share=0.75)
    total = 0.75 * 3 + 2
    assert part.capacity(100).tolist() == [math.ceil(110 * 0.75 / total)] * 3 + [math.ceil(110 / total)] * 2
    assert part.capacity(1).tolist() == [1] * 5


def test_what_is_over_is_dropped_while_training_alone():
    part, scores = Capped(SITE, factor=0.5), torch.tensor([[0.5, 0.3, 0.2, 0, 0]]).expand(10, 5)
    kept = part.train()(scores, Context())
    most = math.ceil(0.5 * 20 / 5)
    assert kept[:most].tolist() == [[0, 1]] * most
    assert bool((kept[most:] == PAD).all())
    assert part.eval()(scores, Context()).tolist() == [[0, 1]] * 10
    assert Capped(SITE, factor=100).train()(scores, Context()).tolist() == [[0, 1]] * 10
    assert part.k == 2
    assert Capped(SITE, of={"kind": "top-p", "p": 0.4}).k == 5


@given(st.integers(0, 99), st.floats(0.05, 3))
def test_no_expert_takes_more_than_it_may(seed, factor):
    scores = torch.randn(17, 5, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    part = Capped(SITE, factor=factor, share=0.5).train()
    kept = part(scores, Context())
    assert bool((torch.bincount(kept[kept != PAD], minlength=5) <= part.capacity(34)).all())


def test_padding_takes_no_room():
    part, scores = Capped(SITE, factor=1.0).train(), torch.tensor([[0.5, 0.3, 0.2, 0, 0]]).expand(10, 5)
    padding = torch.arange(10) < 5
    kept = part(scores, Context(padding=padding))
    assert bool((kept[:5] == PAD).all())
    assert kept[5:7].tolist() == [[0, 1]] * 2  # 10 assignments among 5 experts


def test_the_load_loss_is_that_of_what_was_wanted():
    """A full expert does not look any fuller than it may be to whoever sees what is left."""
    ids, terms = tokens(), {}
    for factor in (0.3, 100.0):
        model = tiny(
            router={"select": {"kind": "capped", "factor": factor}}, balance={"load": 1.0}, num_hidden_layers=1
        )
        out = model.train()(ids, labels=ids)
        terms[factor] = out.losses["load"].item(), int(out.expert_load[0].sum())
    assert terms[0.3][0] == pytest.approx(terms[100.0][0])
    assert terms[0.3][1] < terms[100.0][1] == 48


def test_empty_batches_and_unused_slots():
    part = Capped(SITE).train()
    assert part(torch.empty(0, 5), Context()).shape == (0, 2)
    assert part(torch.full((3, 5), -torch.inf), Context()).tolist() == [[PAD, PAD]] * 3


def test_lives(tmp_path):
    model = lives(tmp_path, router={"select": {"kind": "capped", "factor": 0.6}}, others=["zero"])
    assert not leaks(model)
    load = model.train()(tokens()).expert_load
    assert all(int(count.sum()) < 48 for count in load)


@pytest.mark.parametrize("options", [{"factor": 0}, {"share": -1}])
def test_bad_options(options):
    with pytest.raises(OptionError, match="capacities need a positive factor and share"):
        tiny(router={"select": {"kind": "capped", **options}})


def test_the_number_of_slots_is_that_of_the_selector_inside():
    capped = Capped(SITE)
    capped.k = 1
    assert capped.k == capped.of.k == 1
    with pytest.raises(OptionError, match="top-k of 0 among"):
        capped.k = 0
    with pytest.raises(OptionError, match="TopP has no number of slots that could be 2"):
        Capped(SITE, of="top-p").k = 2
