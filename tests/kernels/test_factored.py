"""Kernels on factored experts: what the decoded weights would compute, without decoding them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bank_kernels import RELU, batch, check, dense

from moekit.formats import LatentBank, LowRankBank
from moekit.kernels import _drive
from moekit.kernels.factored import LatentProducts, LowRankProducts

KINDS = [{}, {"bias": False}, {"activation": RELU}, {"dtype": torch.bfloat16}]
NAMES = ["gated", "unbiased", "plain", "bfloat16"]
GROUPS = [[0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]
whole = SimpleNamespace(
    forward=lambda products, *args: products.forward(*args), slots=lambda products, *args: products.slots(*args)
)
tokens = pytest.mark.parametrize("tokens", [0, 1, 4, 60])
kinds = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


def bound(kind) -> float:
    return 2e-2 if "dtype" in kind else 1e-5


def no_decoding(monkeypatch, bank):
    def refused(*args):
        raise AssertionError("a weight matrix was expanded")

    monkeypatch.setattr(type(bank), "_decode", refused)


def finish(rows):
    return torch.nn.functional.layer_norm(rows, rows.shape[-1:])


@tokens
@kinds
@pytest.mark.parametrize("rows", [0, 3])
def test_low_rank(tokens, kind, rows):
    ranks = [1, 3, 5, 8, 2, 4] if rows else [1, 3, None, 8, 2, None]
    bank = LowRankBank.factorise(dense(**kind), ranks, rows)
    check(LowRankProducts(bank), bank, tokens, bound=bound(kind))


@tokens
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("down", [None, 5])
@pytest.mark.parametrize("run", [_drive, whole], ids=["row by row", "whole batch"])
def test_latent(tokens, group, down, run):
    bank = LatentBank.factorise(dense(), group, 7, share_down=down)
    check(LatentProducts(bank), bank, tokens, run=run)


@kinds
@pytest.mark.parametrize("run", [_drive, whole], ids=["row by row", "whole batch"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_latent_of_every_kind(tokens, kind, run):
    bank = LatentBank.factorise(dense(**kind), 2, 7, share_down=5)
    check(LatentProducts(bank), bank, tokens, run=run, bound=bound(kind))


@pytest.mark.parametrize("run", [_drive, whole], ids=["row by row", "whole batch"])
def test_what_follows_an_expert_is_applied_before_the_weights(run):
    bank = LatentBank.factorise(dense(), 2, 7, share_down=5)
    check(LatentProducts(bank, finish), bank, 30, finish=finish, run=run)
    low = LowRankBank.factorise(dense(), 3, 2)
    check(LowRankProducts(low, finish), low, 30, finish=finish)


def test_one_part_may_be_plain():
    made, source = LatentBank.factorise(dense(bias=False), 3, 7), dense(bias=False)
    bases = {"up": made.stored["shared.up.basis"]}
    cores = [
        {"gate": source.gate_up[e, :8], "up": made.stored[f"{e}.up.core"], "down": source.down[e]} for e in range(6)
    ]
    bank = LatentBank.from_factors(bases, cores, made.group, dtype=torch.float32)
    check(LatentProducts(bank), bank, 9, run=whole)


def test_no_weight_matrix_is_ever_made(monkeypatch):
    x, index, weight = batch(40)
    for products, run in (
        (LowRankProducts(LowRankBank.factorise(dense(), 3, 2)), _drive),
        (LatentProducts(LatentBank.factorise(dense(), 2, 7, share_down=5)), whole),
    ):
        with monkeypatch.context() as patched:
            no_decoding(patched, products.bank)
            assert run.forward(products, x, index, weight).shape == x.shape
            assert run.slots(products, x, index).shape == (*index.shape, 16)


@pytest.mark.parametrize("method", ["forward", "slots"])
def test_a_token_is_projected_once_per_group(monkeypatch, method):
    group = [0, 0, 0, 1, 1, 1]
    products = LatentProducts(LatentBank.factorise(dense(), group, 7))
    seen, enter = [], products._enter
    monkeypatch.setattr(products, "_enter", lambda g, x: seen.append((g, len(x))) or enter(g, x))
    x, index, weight = batch(25)
    getattr(products, method)(x, index, *([weight] if method == "forward" else []))
    expected = {(token, group[e]) for token, row in enumerate(index.tolist()) for e in row if e >= 0}
    assert sum(count for _, count in seen) == len(expected)
    assert [g for g, _ in seen] == [0, 1]


def test_results_do_not_depend_on_the_run():
    products = LatentProducts(LatentBank.factorise(dense(), 2, 7, share_down=5))
    arguments = batch(33)
    assert torch.equal(products.forward(*arguments), products.forward(*arguments))
