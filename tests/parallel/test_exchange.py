"""What travels between real processes: rows and chunks, their gradients, what is counted, and what goes wrong."""

import os

import pytest
import rank_exchange

from moekit.parallel import LocalRanks, ParallelError, Traffic

TABLES = {
    "uneven": [[1, 3, 0, 2], [0, 2, 5, 1], [4, 0, 1, 0], [2, 2, 0, 3]],
    "empty": [[0] * 4 for _ in range(4)],
    "one-way": [[0, 0, 0, 7], [0] * 4, [0] * 4, [0] * 4],
}


def summed(answers, start):
    """Traffic of all ranks together."""
    return sum((Traffic.from_dict(a[start]["traffic"]) for a in answers), Traffic())


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_rows_arrive_in_order_by_either_way(four_ranks, name, dtype):
    rows = TABLES[name]
    answers = four_ranks.ask(rank_exchange.travels, rows, 2, dtype)
    assert all(found["right"] for answer in answers for found in answer.values())
    level = lambda s, t: "self" if s == t else "intra" if s // 2 == t // 2 else "inter"  # noqa: E731
    size = {"float32": 12, "bfloat16": 6, "int64": 24}[dtype]
    crossing = sum(rows[s][t] for s in range(4) for t in range(4) if level(s, t) == "inter")
    for start in ("flat", "two_level"):
        assert summed(answers, start).total(level="inter").nbytes == crossing * size


def test_two_levels_send_fewer_messages_between_nodes(four_ranks):
    answers = four_ranks.ask(rank_exchange.travels, [[2] * 4] * 4, 2, "float32")
    flat, levels = summed(answers, "flat"), summed(answers, "two_level")
    assert flat.total(level="inter").messages == 4 * 2
    assert levels.total(level="inter").messages == 4 * 1
    assert levels.total(level="inter").rows == flat.total(level="inter").rows
    assert levels.total(level="intra").rows == 4 * 4


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_the_way_back_of_gradients(four_ranks, name, idle):
    assert all(four_ranks.ask(rank_exchange.gradient, TABLES[name], idle))


@pytest.mark.parametrize(
    ("owner", "moves"),
    [
        ([0, 1, 2, 3], [(0, 1), (0, 2), (0, 3)]),
        ([0, 0, 3, 1, 1], [(2, 0), (0, 3), (1, 3), (4, 0), (4, 2), (4, 3)]),
        ([2, 2, 2], [(0, 0), (2, 0), (1, 3)]),
        ([0, 1], []),
    ],
)
def test_sparse_gather_and_reduce(four_ranks, owner, moves):
    answers = four_ranks.ask(rank_exchange.chunks, owner, moves)
    assert all(answer["gathered"] and answer["reduced"] for answer in answers)
    traffic = sum((Traffic.from_dict(answer["traffic"]) for answer in answers), Traffic())
    for what in ("weights", "gradients"):
        assert traffic.total(what).nbytes == len(moves) * 24
        assert traffic.total(what).rows == 2 * len(moves)


@pytest.mark.parametrize("slices", [1, 2])
def test_shards_become_the_bank_again(four_ranks, slices):
    assert all(four_ranks.ask(rank_exchange.whole_again, slices))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("layout", "ranks disagree on experts: 5 on rank 0, 4 on rank 1; start all of them with the same model"),
        ("world", "this layout is for 3 ranks, but 2 take part"),
        ("chunks", "0 chunks: a plan is carried out in at least one"),
        ("table", "the table of an exchange is for 1 ranks, but 2 take part"),
        ("rows", "holds 3 rows, but the table sends 0"),
        ("nodes", "2 ranks do not divide over 3 nodes: choose a divisor of 2"),
        ("plan", "this plan is for 3 ranks, but 2 take part: make it for the ranks there are"),
        ("expert", "expert 4 is routed to, but the layout has 4"),
        ("shard", "stores 2 units of experts, but was given 1"),
    ],
)
def test_every_rank_is_told_of_a_mistake(two_ranks, case, message):
    for answer in two_ranks.ask(rank_exchange.refused, case):
        assert message in answer


def test_without_a_process_group():
    assert "start with torchrun" in rank_exchange.no_group()


def test_a_dead_peer_is_one_clear_error():
    """Rank 0 is told long before its own patience, let alone ours, ends."""
    with LocalRanks(2, patience=300) as ranks:
        told, _ = ranks.ask(rank_exchange.dies, 250.0)
        assert "rank 0 of 2 lost its peers while exchanging tokens" in told
        assert "stop all ranks and start them again" in told
        with pytest.raises(ParallelError, match="start new ones"):
            ranks.ask(rank_exchange.no_group)


def test_a_silent_peer_is_the_same_error_after_the_patience(two_ranks):
    told, _ = two_ranks.ask(rank_exchange.silent, 1.0)
    assert "kept the others waiting for more than 1 s" in told


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [(divmod, (1, 0), r"rank 0 of 1 failed: (?s:.*)ZeroDivisionError"), (os._exit, (0,), "rank 0 of 1 died")],
)
def test_a_rank_that_fails_is_named(function, args, message):
    with LocalRanks(1, patience=300) as ranks, pytest.raises(ParallelError, match=message):
        ranks.ask(function, *args)
