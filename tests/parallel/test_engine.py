"""The engine equals one process: outputs and every gradient, for any plan, routing and way of travelling."""

import pytest
import rank_engine


@pytest.mark.parametrize("plan", ["native", "scattered"])
@pytest.mark.parametrize(("chunks", "rematerialise"), [(1, False), (3, False), (2, True)])
def test_two_ranks_equal_one_process(two_ranks, plan, chunks, rematerialise):
    for found in two_ranks.ask(rank_engine.run, plan, 1, chunks, rematerialise, True, "float64"):
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("plan", ["native", "scattered"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_four_ranks_equal_one_process(four_ranks, plan, nodes):
    for found in four_ranks.ask(rank_engine.run, plan, nodes, 2, False, False, "float64"):
        assert max(found.values()) < 1e-12, found


def test_single_precision_is_within_1e_6(four_ranks):
    for found in four_ranks.ask(rank_engine.run, "scattered", 1, 1, False, True, "float32"):
        assert max(found.values()) < 1e-6, found
