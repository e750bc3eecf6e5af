"""Stretches routed as one, experts that choose, given labels: what they compute and that they do not look ahead."""

import math

import pytest
import torch
from wholes import leaks, lives, padding_on_the_left_changes_nothing, tiny, tokens

from moekit.contract import PAD, Context
from moekit.errors import OptionError
from moekit.nn.expert_choice import ExpertChoice
from moekit.nn.flow import begin
from moekit.nn.granularity import Chunk, Label, Sequence
from moekit.nn.parts import Site
from moekit.nn.router import Router
from moekit.nn.sampling import Sampled

SITE = Site(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)
HERE = torch.device("cpu")
CAUSAL = {
    "chunk": {"granularity": {"kind": "chunk", "length": 4}, "weigh": "chosen"},
    "first": {"granularity": {"kind": "sequence", "pool": "first"}},
    "prefix": {"granularity": "sequence"},
    "expert choice": {"select": {"kind": "expert-choice", "share": 0.5}},
}
LEAKING = {
    "chunk": {"granularity": {"kind": "chunk", "length": 4, "causal": False}},
    "last": {"granularity": {"kind": "sequence", "pool": "last"}},
    "mean": {"granularity": {"kind": "sequence", "pool": "mean"}},
    "expert choice": {"select": {"kind": "expert-choice", "share": 0.5, "causal": False}},
}


def seen_by(part: torch.nn.Module, x: torch.Tensor, context: Context) -> torch.Tensor:
    """What the part shows the scorer."""
    return part(x, lambda pooled, _: pooled, context)


@pytest.mark.parametrize("router", CAUSAL.values(), ids=CAUSAL)
def test_what_looks_back_lives_in_a_model_and_does_not_leak(router: dict, tmp_path) -> None:
    assert not leaks(lives(tmp_path, router=router))


@pytest.mark.parametrize("router", LEAKING.values(), ids=LEAKING)
def test_what_looks_ahead_is_caught_by_the_perturbation(router: dict) -> None:
    assert leaks(tiny(router=router), at=6)


@pytest.mark.parametrize("router", [*CAUSAL.values(), *LEAKING.values()])
def test_padding_on_the_left_counts_for_nothing(router: dict) -> None:
    padding_on_the_left_changes_nothing(tiny(router=router))


def test_chunks_of_one_token_are_token_routing() -> None:
    x = torch.randn(10, 8)
    assert torch.equal(seen_by(Chunk(SITE, length=1, causal=False), x, begin(2, 5, HERE)), x)


def test_a_chunk_goes_by_the_mean_of_the_one_before() -> None:
    x = torch.randn(14, 8)
    pooled = seen_by(Chunk(SITE, length=3), x, begin(2, 7, HERE)).view(2, 7, 8)
    rows = x.view(2, 7, 8)
    expected = torch.stack([rows[:, 0]] * 3 + [rows[:, :3].mean(1)] * 3 + [rows[:, 3:6].mean(1)], dim=1)
    torch.testing.assert_close(pooled, expected)
    own = seen_by(Chunk(SITE, length=3, causal=False), x, begin(2, 7, HERE)).view(2, 7, 8)
    torch.testing.assert_close(own[:, 4], rows[:, 3:6].mean(1))
    torch.testing.assert_close(own[:, 6], rows[:, 6])


@pytest.mark.parametrize(("pool", "at"), [("first", 0), ("last", 4), ("mean", slice(None)), ("prefix", slice(0, 3))])
def test_a_sequence_is_pooled_as_named(pool: str, at: object) -> None:
    x = torch.randn(10, 8)
    rows = x.view(2, 5, 8)
    expected = rows[:, at].mean(1) if isinstance(at, slice) else rows[:, at]
    torch.testing.assert_close(seen_by(Sequence(SITE, pool=pool), x, begin(2, 5, HERE)).view(2, 5, 8)[:, 2], expected)


def test_a_label_decides_alone(tmp_path) -> None:
    router = {"granularity": {"kind": "label", "labels": 3}}
    ids = tokens()
    model = lives(tmp_path, router=router, inputs={"task_ids": (ids > 20).long()}, idle=("granularity.vector",))
    gate = model.model.layers[0].mlp.gate
    context = Context(task=torch.tensor([0, 1, 0, 2]))
    expert = gate(torch.randn(4, 32), context)[2]
    assert torch.equal(expert[0], expert[2])
    with pytest.raises(OptionError, match="routing by task needs task_ids with the input"):
        model(ids)
    with pytest.raises(OptionError, match="task_ids from 3 to 3: there are 3 of them"):
        gate(torch.randn(1, 32), Context(task=torch.tensor([3])))


def test_given_labels_are_the_experts() -> None:
    router = Router(SITE, {"score": "given", "select": {"kind": "top-k", "k": 1}})
    routing = router.routing(router(torch.randn(3, 8), Context(modality=torch.tensor([2, 0, 3]))))
    assert routing.expert.tolist() == [[2], [0], [3]]
    assert routing.weight.tolist() == [[1.0]] * 3
    with pytest.raises(OptionError, match="modality_ids from 4 to 4: there are 4 of them"):
        router(torch.randn(1, 8), Context(modality=torch.tensor([4])))


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_expert_choice_equals_brute_force(causal: bool, most: int | None) -> None:
    part = ExpertChoice(SITE, share=0.4, most=most, causal=causal)
    scores = torch.randn(2, 7, 4)
    scores[0, 3] = scores[0, 1]  # a tie: the earlier token wins
    found = part(scores.reshape(14, 4), begin(2, 7, HERE))
    for row in range(2):
        open_to = scores[row].clone()
        if most is not None:
            open_to[scores[row] < scores[row].topk(most, dim=1).values[:, -1:]] = -math.inf
        for token in range(7):
            length = token + 1 if causal else 7
            expected = set()
            for expert in range(4):
                order = sorted(range(length), key=lambda t, e=expert: (-float(open_to[t, e]), t))
                if token in order[: math.ceil(0.4 * length - 1e-9)] and open_to[token, expert] > -math.inf:
                    expected.add(expert)
            assert {int(e) for e in found[row * 7 + token] if e != PAD} == expected


def test_every_expert_takes_its_share_of_each_sequence() -> None:
    found = ExpertChoice(SITE, share=0.25, causal=False)(torch.randn(24, 4), begin(2, 12, HERE))
    for row in found.view(2, 12, -1):
        assert torch.bincount(row[row != PAD], minlength=4).tolist() == [3] * 4


@pytest.mark.parametrize("router", [*CAUSAL.values(), *LEAKING.values()])
def test_edges(router: dict) -> None:
    gate = Router(SITE, router)
    gate.scorer.initialise(0.1)
    assert gate(torch.zeros(0, 8), begin(0, 5, HERE))[0].shape == (0, 4)
    for x in (torch.randn(1, 8), torch.zeros(5, 8), torch.full((3, 8), math.nan)):
        routing = gate.routing(gate(x, begin(1, len(x), HERE)))
        assert int(routing.expert.max()) < 4
        assert routing.weight.shape == routing.expert.shape


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Chunk(SITE, length=0), "chunks of 0 tokens: give 1 or more"),
        (lambda: Sequence(SITE, pool="sum"), "pool='sum' of a sequence: choose first, last, mean or prefix"),
        (lambda: Label(SITE, labels=0), "labels=0: give how many task ids there are, 1 or more"),
        (lambda: Label(SITE, labels=2, label="topic"), "labels called 'topic': choose one of modality, task"),
        (lambda: ExpertChoice(SITE, share=0), "share=0 of a sequence's tokens: give more than 0 and at most 1"),
        (lambda: ExpertChoice(SITE, share=1, most=5), "most=5 of 4 experts: give 1 to 4"),
        (lambda: Router(SITE, {"score": "offered"})(torch.zeros(1, 8)), "the scorer 'offered' only works where "
         "something offers logits, as in attention by query"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(make, told: str) -> None:
    with pytest.raises(OptionError) as error:
        make()
    assert str(error.value) == told


def test_a_hash_gives_each_word_its_experts_for_good(tmp_path) -> None:
    model = lives(tmp_path, router={"score": "hash"})
    gate = model.model.layers[0].mlp.gate
    ids = torch.arange(40).repeat(2)
    expert = gate(torch.randn(80, 32), Context(input_ids=ids))[2]
    assert torch.equal(expert[:40], expert[40:])
    assert torch.bincount(expert[:40].flatten(), minlength=4).tolist() == [20] * 4
    assert (expert[:, 0] != expert[:, 1]).all()
    other = Router(Site(**{**vars(SITE), "vocab_size": 40}), {"score": {"kind": "hash", "seed": 1}})
    assert not torch.equal(other(torch.randn(40, 8), Context(input_ids=ids[:40]))[2], expert[:40])
    with pytest.raises(OptionError, match="routing by a hash of the token needs input_ids, not embeddings"):
        gate(torch.randn(1, 32))


def test_some_choices_are_drawn_by_their_scores_while_training(tmp_path) -> None:
    lives(tmp_path, router={"select": "sampled"})
    torch.manual_seed(0)
    part = Sampled(SITE, drawn=1)
    scores = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).expand(6000, -1)
    found = part(scores, Context())
    assert (found[:, 0] == 1).all()
    share = torch.bincount(found[:, 1], minlength=4) / 6000
    torch.testing.assert_close(share, torch.tensor([0.2, 0.0, 0.2, 0.6]), atol=0.03, rtol=0)
    assert torch.equal(part.eval()(scores, Context()), torch.tensor([[1, 3]]).expand(6000, -1))
    everything = Sampled(SITE, drawn=2)(scores, Context())
    assert set(everything.flatten().tolist()) == {0, 1, 2, 3}
    assert (everything[:, 0] != everything[:, 1]).all()


def test_what_may_not_be_chosen_is_not_drawn() -> None:
    part = Sampled(SITE, drawn=1)
    scores = torch.tensor([[-math.inf, 0.4, -math.inf, -math.inf], [math.nan, 0.0, 0.0, 1.0]])
    found = part(scores, Context())
    assert sorted(found[0].tolist()) == [PAD, 1]
    assert found[1, 0] == 3
    with pytest.raises(OptionError, match="drawn=3 of k=2 choices: give 0 to 2"):
        Sampled(SITE, drawn=3)
    with pytest.raises(OptionError, match="k=9 among 4 experts: give 1 to 4"):
        Sampled(SITE, k=9)
