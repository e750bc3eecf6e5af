"""LatentBank: exact where a group shares a space, the error of the SVD elsewhere, version 1 and version 2."""

from __future__ import annotations

import pytest
import torch
from banks import PLAIN, make
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OptionError
from moekit.formats import DenseBank, LatentBank


def in_one_space(generator, experts=4, hidden=20, inner=6, size=6) -> DenseBank:
    """Gate, up and down of all experts built from one basis each."""

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    gate, up, down = random(size, hidden), random(size, hidden), random(hidden, size)
    gates, ups, downs = random(experts, inner, size) @ gate, random(experts, inner, size) @ up, None
    downs = down @ random(experts, size, inner)
    return DenseBank(torch.cat([gates, ups], 1), downs)


def test_experts_of_one_space_come_back():
    dense = in_one_space(torch.Generator().manual_seed(0))
    bank = LatentBank.factorise(dense, 4, 6, share_down=6)
    for expert in range(4):
        for got, source in zip(bank.expert(expert)[:2], dense.expert(expert)[:2], strict=True):
            torch.testing.assert_close(got, source, rtol=1e-4, atol=1e-4)
    smaller = LatentBank.factorise(dense, 4, 5)
    assert (smaller.expert(0).gate_up - dense.gate_up[0]).norm() > 0.1 * dense.gate_up[0].norm()
    assert torch.equal(smaller.expert(0).down, dense.down[0])


@settings(max_examples=25)
@given(
    group=st.sampled_from([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 3], [1, 0, 0, 0]]),
    size=st.integers(1, 5),
    down=st.integers(1, 5),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_error_is_what_the_svd_discards(group, size, down, gated, seed):
    dense = make(4, 9, 5, seed=seed, **({} if gated else {"activation": PLAIN}))
    bank = LatentBank.factorise(dense, group, size, share_down=down)
    got = bank.dequantise()
    for g in set(group):
        members = [e for e in range(4) if group[e] == g]
        stacks = {"down": (dense.down[members].transpose(1, 2), got.down[members].transpose(1, 2), down)}
        halves = zip(dense.gate_up[members].split(5, 1), got.gate_up[members].split(5, 1), strict=True)
        stacks |= {str(i): (a, b, size) for i, (a, b) in enumerate(halves)}
        for source, made, kept in stacks.values():
            expected = torch.linalg.svdvals(source.reshape(-1, 9))[kept:].norm()
            torch.testing.assert_close((source - made).norm(), expected, rtol=1e-3, atol=1e-4)


def test_bytes_are_those_of_the_paper():
    """g m n -> m n + g m**2 per group and matrix, for gate and up; down stays."""
    dense = make(8, 32, 6, torch.bfloat16, bias=False)
    bank = LatentBank.factorise(dense, 4, 6)
    assert bank.nbytes == 2 * (2 * 2 * (6 * 32 + 4 * 6 * 6) + 8 * 32 * 6)
    assert bank.nbytes < dense.nbytes


def test_selecting_drops_and_renumbers_groups():
    bank = LatentBank.factorise(make(6, 16, 8), 2, 7)
    chosen = bank.select([5, 0, 4])
    assert chosen.group == (0, 1, 0)
    assert torch.equal(chosen.stored["shared.up.basis"], bank.stored["shared.up.basis"][[2, 0]])


def test_errors_say_what_is_possible():
    dense = make(4, 12, 8)
    with pytest.raises(OptionError, match="latent=13 of gate is above full rank, which is 12"):
        LatentBank.factorise(dense, 2, 13)
    with pytest.raises(OptionError, match="latent=10 of group 0 is above full rank, which is 8"):
        LatentBank.factorise(dense, 1, 10)
    with pytest.raises(OptionError, match="latent=13 of down is above full rank, which is 12"):
        LatentBank.factorise(dense, 2, 4, share_down=13)
    with pytest.raises(OptionError, match="latent=0 is not possible"):
        LatentBank.factorise(dense, 2, 0)
    with pytest.raises(OptionError, match="group=0 is not possible"):
        LatentBank.factorise(dense, 0, 4)
    with pytest.raises(OptionError, match="group lists 3 experts, but the bank has 4"):
        LatentBank.factorise(dense, [0, 0, 1], 4)
    for groups in ([0, 0, 2, 2], [1, 1, 1, 1]):
        with pytest.raises(OptionError, match="groups must be numbered 0 to n - 1"):
            LatentBank.factorise(dense, groups, 4)
    bank = LatentBank.factorise(dense, 2, 4)
    for change, match in (
        ({"group": [0, 0, 2, 2]}, "numbered 0 to n - 1"),
        ({"up_latent": 13}, "latent=13 of up is above full rank"),
    ):
        with pytest.raises(OptionError, match=match):
            LatentBank.allocate(bank.describe() | change, 12, 8, device="meta")
    with pytest.raises(OptionError, match="at least one expert"):
        LatentBank.from_factors({}, [], [], dtype=torch.float32)
    bases, cores = {"up": torch.zeros(1, 3, 6)}, [{"up": torch.zeros(4, 2), "down": torch.zeros(6, 4)}]
    with pytest.raises(OptionError, match=r"need 0\.up\.core of shape \(4, 3\), got \(4, 2\)"):
        LatentBank.from_factors(bases, cores, [0], dtype=torch.float32, activation=PLAIN)
