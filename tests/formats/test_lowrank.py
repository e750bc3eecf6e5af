"""LowRankBank: the best approximation at its rank, rows of the remainder exact, and factors stored as given."""

from __future__ import annotations

import pytest
import torch
from banks import PLAIN, make
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OptionError
from moekit.formats import DenseBank, Factors, LowRankBank


@settings(max_examples=30)
@given(
    hidden=st.integers(2, 14),
    inner=st.integers(2, 14),
    rank=st.integers(1, 14),
    rows=st.integers(0, 4),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_the_best_of_its_rank(hidden, inner, rank, rows, gated, seed):
    rank, rows = min(rank, hidden, inner), min(rows, hidden, inner)
    dense = make(2, hidden, inner, seed=seed, **({} if gated else {"activation": PLAIN}))
    bank = LowRankBank.factorise(dense, rank, rows)
    for part in bank.parts:
        whole = dense.gate_up[1].chunk(2)[part == "up"] if gated else dense.gate_up[1]
        weight = dense.down[1] if part == "down" else whole
        rest = weight - bank.matrix(1, part)
        values = torch.linalg.svdvals(weight)[rank:]
        if not rows:
            torch.testing.assert_close(rest.norm(), values.norm(), rtol=1e-4, atol=1e-4)
        kept = bank.stored[f"1.{part}.rows"].long() if rows else torch.empty(0, dtype=torch.long)
        assert rest[kept].abs().max() < 1e-5 if rows else True
        left, right = bank.stored[f"1.{part}.left"], bank.stored[f"1.{part}.right"]
        plain = (weight - left @ right).norm(dim=1)
        assert plain[kept].min() >= plain.sort(descending=True).values[max(rows - 1, 0)] - 1e-6 if rows else True


def test_full_rank_is_the_matrix_and_no_rank_is_left_alone():
    dense = make(3, 12, 8)
    bank = LowRankBank.factorise(dense, {"gate": 8, "up": None, "down": [8, None, 2]})
    torch.testing.assert_close(bank.expert(0).gate_up, dense.gate_up[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bank.expert(0).down, dense.down[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(bank.matrix(1, "up"), dense.gate_up[1, 8:])
    assert torch.equal(bank.matrix(1, "down"), dense.down[1])
    assert bank.nbytes == 4 * (3 * (8 * 20 + 8 * 12) + 8 * 20 + 12 * 8 + 2 * 20 + 3 * (16 + 12))
    assert bank.describe()["down_rank"] == [8, None, 2]


def test_factors_are_stored_as_given():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    up, down = Factors(random(4, 2), random(2, 6), torch.tensor([3, 1]), random(2, 6)), random(6, 4)
    bank = LowRankBank.from_factors([{"up": up, "down": down}], dtype=torch.float32, activation=PLAIN)
    expected = up.left @ up.right
    expected[3] += up.sparse[0]
    expected[1] += up.sparse[1]
    torch.testing.assert_close(bank.expert(0).gate_up, expected)
    assert bank.stored["0.up.rows"].tolist() == [1, 3]
    assert torch.equal(bank.expert(0).down, down)
    assert bank.describe()["up_rows"] == [2]


def test_even_split_keeps_half_precision_accurate():
    dense = make(1, 64, 48, torch.bfloat16, bias=False)
    scaled = DenseBank(dense.gate_up * 1e-3, dense.down * 1e3)
    bank = LowRankBank.factorise(scaled, 48)
    for got, source in zip(bank.expert(0)[:2], scaled.expert(0)[:2], strict=True):
        assert (got.float() - source.float()).norm() < 0.01 * source.float().norm()


def test_errors_say_what_is_possible():
    dense = make(2, 12, 8)
    with pytest.raises(OptionError, match=r"rank=9 is not possible for 0\.gate: \[8, 12\] has ranks 1 to 8"):
        LowRankBank.factorise(dense, 9)
    with pytest.raises(OptionError, match=r"rank=0 is not possible for 1\.down"):
        LowRankBank.factorise(dense, {"gate": 1, "up": 1, "down": [1, 0]})
    with pytest.raises(OptionError, match="rank lists 3 experts, but the bank has 2"):
        LowRankBank.factorise(dense, [1, 1, 1])
    with pytest.raises(OptionError, match=r"rows=9 is not possible for 0\.gate: it has 8 rows"):
        LowRankBank.factorise(dense, 2, 9)
    with pytest.raises(OptionError, match="no remainder to keep 1 rows of"):
        LowRankBank.factorise(dense, None, 1)
    with pytest.raises(OptionError, match="at least one expert"):
        LowRankBank.from_factors([], dtype=torch.float32)
    given = {"up": Factors(torch.zeros(4, 2), torch.zeros(3, 6)), "down": torch.zeros(6, 4)}
    with pytest.raises(OptionError, match=r"need 0\.up\.right of shape \(2, 6\), got \(3, 6\)"):
        LowRankBank.from_factors([given], dtype=torch.float32, activation=PLAIN)
    for rows in ([0, 0], [0, 4], [-1, 2]):
        bad = Factors(torch.zeros(4, 2), torch.zeros(2, 6), torch.tensor(rows), torch.zeros(2, 6))
        with pytest.raises(OptionError, match=r"rows of 0\.up must be different and from 0 to 3"):
            LowRankBank.from_factors([{**given, "up": bad}], dtype=torch.float32, activation=PLAIN)
    described = LowRankBank.factorise(dense, 2).describe()
    with pytest.raises(OptionError, match=r"rank=13 is not possible for 0\.up"):
        LowRankBank.allocate(described | {"up_rank": [13, 13]}, 12, 8, device="meta")
