"""Experts spread inside groups: the same model, gradients summed over the right ranks, no token outside its group."""

import pytest
import rank_groups

from moekit.lab.experiments._spread import grouped
from moekit.parallel import Grid, ParallelError, World
from moekit.parallel._groups import degree_for


def test_four_ranks_as_groups(four_ranks):
    found = four_ranks.ask(rank_groups.members, 1, 2)
    assert [one["inside"] for one in found] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [one["across"] for one in found] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert found[0]["grids"] == [(1, 2), (1, 2)]


@pytest.mark.parametrize(("size", "grids"), [(1, [(1, 1), (2, 2)]), (2, [(1, 2), (2, 1)]), (4, [(2, 2), (1, 1)])])
def test_groups_stay_on_as_few_nodes_as_they_can(four_ranks, size, grids):
    assert all(one["grids"] == grids for one in four_ranks.ask(rank_groups.members, 2, size))


@pytest.mark.parametrize(("experts", "degree", "nodes", "size"), [(5, 2, 2, 2), (2, 4, 1, 2), (4, 1, 1, 1)])
def test_a_model_in_groups_is_the_model(four_ranks, experts, degree, nodes, size):
    for found in four_ranks.ask(rank_groups.trains, experts, degree, nodes):
        assert found["logits"] < 1e-12
        assert found["gradients"] < 1e-10
        assert found["changed"] == 0
        assert found["sizes"] == {size}
        assert found["between nodes"] == 0


def test_a_group_over_two_nodes_exchanges_in_two_levels(four_ranks):
    assert max(four_ranks.ask(rank_groups.levels)) < 1e-12


@pytest.mark.parametrize(
    ("nodes", "size", "message"),
    [(1, 3, "4 ranks do not divide into groups of 3"), (1, 0, "into groups of 0"), (2, 8, "into groups of 8")],
)
def test_sizes_that_cannot_be(four_ranks, nodes, size, message):
    assert all(message in told for told in four_ranks.ask(rank_groups.refused, nodes, size))


def test_degrees():
    world = World(0, Grid(3, 2), 1.0, None, None)
    assert [degree_for(experts, world) for experts in (1, 2, 3, 5, 6, 64)] == [1, 2, 2, 2, 6, 6]
    assert degree_for(64, world, 2) == 2
    assert degree_for(64, world, 3) == 2  # groups of 3 would cut nodes of 2
    with pytest.raises(ParallelError, match="degree=0: spread every layer over 1 rank or more"):
        degree_for(64, world, 0)


def test_ranks_that_disagree_are_told(two_ranks):
    for told in two_ranks.ask(rank_groups.odd):
        assert "ranks disagree on groups: 1 on rank 0, 2 on rank 1" in told


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_in_groups_equal_one_process(four_ranks, size):
    for found in four_ranks.ask(grouped, size):
        assert max(found.values()) < 1e-12, found


def test_layers_in_groups_of_two_ranks(two_ranks):
    for found in two_ranks.ask(grouped, 1):
        assert max(found.values()) < 1e-12, found
