"""Rewrites of a routing: limit cases that are the routing itself or plain top slots, and what each of them adds."""

from __future__ import annotations

import pytest
import torch

from moekit.contract import Routing
from moekit.errors import OptionError
from moekit.formats import DenseBank, NestedBank
from moekit.kernels import BankExperts, forward
from moekit.kernels.rewrites import (
    AuxiliaryVectors,
    BitWidths,
    PrefixMask,
    ProjectionVectors,
    RatioSkip,
    Rewrite,
    TopSlots,
    allocate_rewrite,
)

T, K, E, H, INNER = 40, 4, 6, 8, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(slots: int = K, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = draw(tokens, E, seed=1).argsort(1)[:, :slots]
    weight = draw(tokens, slots, seed=2).exp()
    return draw(tokens, H), index, weight / weight.sum(1, keepdim=True)


def bank() -> DenseBank:
    return DenseBank(draw(E, 2 * INNER, H, seed=3), draw(E, H, INNER, seed=4))


def heads() -> list[Rewrite]:
    return [
        RatioSkip(0.4, 9.0),
        PrefixMask(draw(K, H + K), draw(K)),
        AuxiliaryVectors(draw(E, H), 2),
        ProjectionVectors(draw(E, H), draw(E, H), draw(E, INNER), 2),
        BitWidths((2, 3, 4), draw(E, 3, H), draw(E, 3)),
    ]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rewrite", heads(), ids=lambda r: r.KIND)
def test_a_description_and_tensors_are_all_there_is(rewrite: Rewrite) -> None:
    again = allocate_rewrite(rewrite.describe(), E, H, "meta").to_empty(device="cpu")
    again.load_state_dict(rewrite.state_dict())
    assert equal(again.eval()(*routed()), rewrite(*routed()))
    assert [len(part) for part in rewrite(*routed(tokens=0))] == [0, 0, 0]
    whole, one = rewrite(*routed()), rewrite(*(part[7:8] for part in routed()))
    assert torch.equal(whole[1][7:8], one[1])
    torch.testing.assert_close(whole[2][7:8], one[2])


def test_with_two_slots_the_second_goes_below_the_ratio() -> None:
    x, index, weight = routed(2)
    heavy = weight.argmax(1, keepdim=True)
    small = weight.amin(1) / weight.amax(1) < 0.5
    _, kept, left = RatioSkip(0.5)(x, index, weight)
    assert 0 < small.sum() < T
    assert torch.equal((kept >= 0).sum(1), 2 - small.long())
    assert torch.equal(kept.gather(1, heavy), index.gather(1, heavy))
    torch.testing.assert_close(left.sum(1), weight.sum(1))
    assert equal(RatioSkip(0.0)(x, index, weight), (x, index, weight))


def test_slots_are_skipped_from_the_lightest_up() -> None:
    weight = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    x, index = torch.zeros(1, H), torch.tensor([[0, 1, 2, 3]])
    for ratio, kept in ((0.11, [0, 1, 2, 3]), (0.12, [-1, 1, 2, 3]), (0.34, [-1, 1, -1, 3]), (1.01, [-1, 1, -1, -1])):
        assert RatioSkip(ratio)(x, index, weight)[1].tolist() == [kept]


def test_protected_tokens_keep_every_slot() -> None:
    x, index, weight = routed()
    norm = x.abs().sum(1)
    limit = float(norm.quantile(0.8))
    free, safe = RatioSkip(5.0)(x, index, weight), RatioSkip(5.0, limit)(x, index, weight)
    assert ((free[1] >= 0).sum(1) == 1).all()
    assert torch.equal((safe[1] >= 0).sum(1), torch.where(norm >= limit, K, 1))


def test_a_mask_of_ones_is_the_routing_itself() -> None:
    assert equal(PrefixMask.whole(K, H)(*routed()), routed())


def test_masks_keep_the_heaviest_slots_and_always_one() -> None:
    x, index, weight = routed()
    head = PrefixMask(draw(K, H + K, seed=5), torch.zeros(K))
    _, kept, left = head(x, index, weight)
    count = (kept >= 0).sum(1)
    assert torch.equal(count, head.logits(x, weight).argmax(1) + 1)
    assert len(set(count.tolist())) == K
    for size in range(1, K + 1):
        rows = count == size
        assert torch.equal(kept[rows], TopSlots(size)(x, index, weight)[1][rows])
    torch.testing.assert_close(left.sum(1), weight.sum(1))


def test_a_mask_in_training_expects_what_it_draws() -> None:
    x, index, weight = routed()
    head = PrefixMask(torch.zeros(K, H + K), torch.tensor([0.0, 0.0, 0.0, 60.0])).train()
    torch.testing.assert_close(head(x, index, weight)[2], weight)
    assert float(head.cost) == pytest.approx(1)
    head = PrefixMask(torch.zeros(K, H + K), torch.tensor([60.0, 0.0, 0.0, 0.0])).train()
    torch.testing.assert_close(head(x, index, weight)[2], TopSlots(1)(x, index, weight)[2])
    assert float(head.cost) == pytest.approx(1 / K)
    head = PrefixMask.whole(K, H).train().requires_grad_(True)
    (head.cost + head(x, index, weight)[2].square().sum()).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


def test_vectors_of_ones_are_the_top_slots_bit_for_bit() -> None:
    for main in range(1, K + 1):
        for keep in (True, False):
            ones = AuxiliaryVectors(torch.ones(E, H), main, renormalise=keep)
            assert equal(ones(*routed()), TopSlots(main, renormalise=keep)(*routed()))


def test_vectors_are_mixed_by_their_share_of_the_auxiliary_weight() -> None:
    x, index = draw(1, H), torch.tensor([[4, 1, 0]])
    theta = draw(E, H)
    got, kept, weight = AuxiliaryVectors(theta, 1)(x, index, torch.tensor([[0.6, 0.1, 0.3]]))
    torch.testing.assert_close(got, x * (0.25 * theta[1] + 0.75 * theta[0]))
    assert kept.tolist() == [[4, -1, -1]]
    assert weight.tolist() == [[1.0, 0.0, 0.0]]
    assert torch.equal(AuxiliaryVectors(theta, 1)(x, torch.tensor([[4, -1, -1]]), weight)[0], x)


def test_vectors_of_experts_that_never_stand_aside_learn_nothing() -> None:
    x, index, weight = routed()
    rewrite = AuxiliaryVectors(torch.ones(E, H), 2).requires_grad_(True)
    order = weight.argsort(1, descending=True)
    used = set(index.gather(1, order)[:3, 2:].flatten().tolist())
    rewrite(x[:3], index[:3], weight[:3])[0].square().sum().backward()
    assert rewrite.theta.grad is not None
    assert {e for e in range(E) if rewrite.theta.grad[e].any()} == used
    assert len(used) < E


def nested() -> NestedBank:
    return NestedBank.quantise(bank(), bits=4, base_bits=2, group_size=4)


def test_every_slot_runs_at_the_width_its_head_says() -> None:
    x, index, weight = routed()
    head = BitWidths((2, 3, 4), draw(E, 3, H), draw(E, 3))
    at = head.choice(x, index)
    assert set(at.flatten().tolist()) == {0, 1, 2}
    expected = torch.zeros(T, H)
    for place, width in enumerate((2, 3, 4)):
        only = torch.where(at == place, index, -1)
        expected += forward(nested().at(width), x, Routing(only, weight))
    module = BankExperts(nested(), rewrite=head).eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x, index, weight), expected)
        widest = BitWidths((2, 3, 4), torch.zeros(E, 3, H), torch.tensor([[0.0, 0.0, 1.0]]).expand(E, 3).clone())
        found = BankExperts(nested(), rewrite=widest).eval()(x, index, weight)
    torch.testing.assert_close(found, forward(nested(), x, Routing(index, weight)))


def test_unused_slots_stay_unused() -> None:
    x, index, weight = routed()
    index[0], index[1] = -1, E
    head = BitWidths((2, 3, 4), draw(E, 3, H), draw(E, 3))
    assert (head(x, index, weight)[1][:2] == -1).all()
    assert (head(x, index, weight)[1][2:] >= 0).all()


def test_widths_share_their_planes() -> None:
    held = nested()
    spread = BitWidths((2, 3, 4), draw(E, 3, H), draw(E, 3)).runs(held)
    assert spread.bits == (2, 3, 4) * E
    assert spread.stored["5.down.qweight"] is held.stored["1.down.qweight"]
    assert torch.equal(spread.expert(4).gate_up, held.at(3).expert(1).gate_up)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RatioSkip(-1.0), r"ratio=-1.0 must be a number from 0 \(nothing is skipped\) up"),
        (lambda: ProjectionVectors.ones(E, H, INNER, 0), "main=0 leaves nothing to run: keep at least 1 slot"),
        (lambda: AuxiliaryVectors(torch.ones(E, H), 0), "main=0 leaves nothing to run: keep at least 1 slot"),
        (
            lambda: BitWidths((2, 3), torch.ones(E, 2, H), torch.ones(E, 2)).runs(bank()),
            "widths per token need experts stored as nested planes, not as DenseBank",
        ),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()
