"""The load-balancing loss over micro-batches, steps and ranks: what is shared out, and what is forgotten when."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wholes import tiny, tokens

from moekit.contract import Context, Routing
from moekit.errors import OptionError
from moekit.nn import Router, Seen, Site, finish_step
from moekit.nn.load import Load, SoftLoad

SITE = Site(hidden_size=6, intermediate_size=5, num_experts=4, top_k=2)


def seen(logits, context=None):
    value, expert = logits.detach().softmax(-1).topk(2, dim=1)
    return Seen(torch.zeros(len(logits), 6), Routing(expert, value, logits), Router(SITE), None, context or Context())


def micro_batches(count, tokens_=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens_, 4, generator=draw) * 2 + torch.randn(4, generator=draw) for _ in range(count)]


@pytest.mark.parametrize("scope", ["micro", "accumulated", "global"])
def test_with_one_micro_batch_all_agree(scope):
    (logits,) = micro_batches(1)
    wide = Load(SITE, scope=scope)
    assert torch.isclose(wide(seen(logits)), Load(SITE)(seen(logits)))
    wide.finish_step()
    assert torch.isclose(wide(seen(logits)), Load(SITE)(seen(logits)))


@given(st.integers(1, 5), st.integers(0, 999))
def test_global_is_the_loss_of_the_whole_batch(count, seed):
    """E sum f P of all tokens at once equals the mean over micro-batches of E sum f_all P_j, once all are counted."""
    batches = micro_batches(count, seed=seed)
    whole = Load(SITE)(seen(torch.cat(batches)))
    term = Load(SITE, scope="accumulated")
    for logits in batches[:-1]:
        term(seen(logits))
    last = term(seen(batches[-1]))
    shares = term.count_E / term.count_E.sum()
    parts = [4 * (shares * logits.softmax(-1).mean(0)).sum() for logits in batches]
    assert torch.isclose(last, parts[-1], atol=1e-5)
    assert torch.isclose(torch.stack(parts).mean(), whole, atol=1e-5)


def test_so_is_its_gradient_and_counts_carry_none():
    batches = [logits.requires_grad_() for logits in micro_batches(3)]
    whole = torch.cat(batches).detach().requires_grad_()
    Load(SITE)(seen(whole)).backward()
    term = Load(SITE, scope="accumulated")
    with torch.no_grad():
        for logits in batches:
            term(seen(logits))
    counted = term.count_E.clone()
    for logits in batches:
        term.count_E.copy_(counted - seen(logits).chosen_TE.sum(0))  # so that every micro-batch sees all counts
        (term(seen(logits)) / 3).backward()
    assert torch.allclose(torch.cat([logits.grad for logits in batches]), whole.grad, atol=1e-6)


def test_each_micro_batch_adds_to_what_was_seen_before_it():
    term, batches = Load(SITE, scope="accumulated"), micro_batches(3)
    for number, logits in enumerate(batches):
        value = term(seen(logits))
        count = seen(torch.cat(batches[: number + 1])).chosen_TE.sum(0)
        assert torch.equal(term.count_E, count)
        assert torch.isclose(value, 4 * (count / count.sum() * logits.softmax(-1).mean(0)).sum())
    term.finish_step()
    assert term.count_E.tolist() == [0, 0, 0, 0]


def test_one_domain_a_micro_batch_costs_only_the_narrow_scope():
    """Two domains, each on experts of its own: balanced as a whole, unbalanced in every micro-batch."""
    one = torch.tensor([[4.0, 4.0, 0.0, 0.0]]).repeat(8, 1)
    halves = [one, one.flip(1)]
    wide = Load(SITE, scope="accumulated")
    wide(seen(halves[0]))
    narrow = sum(float(Load(SITE)(seen(half))) for half in halves) / 2
    assert float(wide(seen(halves[1]))) == pytest.approx(1.0, abs=1e-5)
    assert narrow > 1.8


def test_padding_is_not_counted():
    logits = micro_batches(1)[0]
    padding = torch.arange(8) >= 5
    term = Load(SITE, scope="accumulated")
    value = term(seen(logits, Context(padding=padding)))
    assert torch.isclose(value, Load(SITE)(seen(logits[:5])), atol=1e-6)
    assert int(term.count_E.sum()) == 10


def test_recomputation_counts_once():
    counts = []
    for again in (False, True):
        model = tiny(balance={"load": {"weight": 0.1, "scope": "accumulated"}}).train()
        if again:
            model.gradient_checkpointing_enable()
        gradient = []
        for seed in (1, 2):
            ids = tokens(seed=seed)
            model(ids, labels=ids).loss.backward()
            gradient.append(model.model.layers[0].mlp.gate.scorer.weight.grad.clone())
        layer = model.model.layers[0].mlp
        counts.append((layer.tally.count_E.clone(), layer.balance["load"].count_E.clone(), gradient[1]))
        finish_step(model)
        assert int(layer.balance["load"].count_E.sum()) == int(layer.tally.count_E.sum()) == 0
    for plain, twice in zip(*counts, strict=True):
        assert torch.allclose(plain.float(), twice.float(), atol=1e-6)
    assert int(counts[0][0].sum()) == 2 * 24 * 2


def test_two_ranks_count_as_one(monkeypatch):
    """f is that of all micro-batches of all ranks so far, P the rank's own; only counts are exchanged."""
    batches = micro_batches(4)  # two micro-batches of two ranks: 0 and 2 are ours
    theirs = [seen(batches[number]).chosen_TE.sum(0) for number in (1, 3)]
    sent = []

    def all_reduce(tensor):
        sent.append(tensor.clone())
        tensor += theirs[len(sent) - 1]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    term = Load(SITE, scope="global")
    for number in range(2):
        logits = batches[2 * number].requires_grad_()
        value = term(seen(logits))
        total = seen(torch.cat(batches[: 2 * number + 2])).chosen_TE.sum(0)
        assert torch.equal(term.count_E, total)
        assert torch.isclose(value, 4 * (total / total.sum() * logits.softmax(-1).mean(0)).sum())
        assert torch.equal(sent[number], seen(logits).chosen_TE.sum(0))
        assert not sent[number].requires_grad
    Load(SITE, scope="accumulated")(seen(batches[0]))
    assert len(sent) == 2


def test_a_cold_soft_load_is_the_square_of_top_1_shares_with_a_gradient():
    logits = micro_batches(1, tokens_=50)[0].requires_grad_()
    share = torch.bincount(logits.argmax(1), minlength=4) / 50
    assert SoftLoad(SITE, temperature=1e-5)(seen(logits)).item() == pytest.approx(
        float(4 * share.square().sum()), rel=1e-3
    )
    SoftLoad(SITE)(seen(logits)).backward()
    assert bool((logits.grad != 0).any())
    assert float(SoftLoad(SITE)(seen(torch.zeros(5, 4)))) == pytest.approx(1)


def test_nearly_even_probabilities_hide_a_load_from_one_loss_and_not_from_the_other():
    hidden = torch.tensor([[0.01, 0.005, 0.0, 0.0]]).repeat(9, 1)  # all tokens choose the first expert
    assert float(Load(SITE)(seen(hidden))) == pytest.approx(1, abs=0.01)
    assert float(SoftLoad(SITE, temperature=1e-3)(seen(hidden))) > 3.9
    padding = torch.arange(9) >= 5
    mixed = torch.cat((hidden[:5], -hidden[:4]))
    padded = SoftLoad(SITE)(seen(mixed, Context(padding=padding)))
    assert torch.isclose(padded, SoftLoad(SITE)(seen(hidden[:5])))


def test_a_soft_load_needs_a_temperature():
    with pytest.raises(OptionError, match="temperature=0 of a soft load"):
        SoftLoad(SITE, temperature=0)
    model = tiny(balance={"soft-load": 0.1}).train()
    assert model(tokens(), labels=tokens()).losses["soft-load"] > 0
