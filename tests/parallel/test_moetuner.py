"""MoETuner: equal loads first, then quiet links; uneven counts of experts really run, and send what was counted."""

from itertools import pairwise

import numpy as np
import pytest
import rank_placed

from moekit.errors import OptionError
from moekit.lab.experiments import _placing
from moekit.lab.experiments import moetuner as experiment
from moekit.parallel import _solver_links
from moekit.parallel._links import Grid
from moekit.parallel._traffic import Flow, movement
from moekit.parallel.moetuner import MoETuner, clustered, links
from moekit.parallel.placement import Placement, placer
from moekit.profile import RoutingTrace


def flow_of(counts, seed=0):
    rng = np.random.default_rng(seed)
    counts = np.asarray(counts, float)
    shares = [a[:, None] * b[None] / a.sum() for a, b in pairwise(counts)]
    return Flow(counts, np.array([rng.poisson(share) for share in shares], float))


SKEWED = [[60, 20, 10, 10, 10, 10], [10, 50, 20, 20, 10, 10], [30, 30, 30, 10, 10, 10]]


def test_loads_are_equal_where_they_can_be():
    """60 of 120 on one expert: with two devices it gets one alone, which equal counts forbid."""
    placed = MoETuner().place(flow_of(SKEWED), Grid.of(2))
    assert placed.value["deviation"] == 0
    assert placed.value["imbalance"] == 1
    assert placed.placement.sizes[0].min() == 1
    assert placed.placement.sizes.sum(0).tolist() == [9, 9]  # equal over all layers
    assert placed.value["experts beyond room"] == 0
    even = placer("balanced").place(flow_of(SKEWED), Grid.of(2))
    assert even.value["imbalance"] > 1.2


def test_links_are_chosen_for_the_clusters():
    """Names of devices alone decide the second objective: shuffling them per layer makes it worse, never better."""
    flow, rng = flow_of(SKEWED, seed=2), np.random.default_rng(0)
    placed = MoETuner().place(flow, Grid.of(3))
    device = placed.placement.device
    for _ in range(30):
        shuffled = np.stack([rng.permutation(3)[row] for row in device])
        between = clustered(flow, shuffled, 3)
        worse = _solver_links.busiest(between, links(Grid.of(3), 1.0), np.tile(np.arange(3), (3, 1))) / flow.total
        assert worse >= placed.bound["busiest link"] - 1e-12
    assert placed.bound["busiest link"] <= placed.value["busiest link"]


def test_slow_links_between_nodes_are_avoided():
    assert links(Grid.of(4, 2), 8.0)[0].tolist() == [1, 1, 8, 8]
    flow = flow_of(np.full((3, 8), 20.0), seed=1)
    pairs = flow.pairs.copy()
    pairs[:, :4, :4] += 50
    pairs[:, 4:, 4:] += 50
    placed = MoETuner().place(Flow(flow.counts, pairs), Grid.of(4, 2))
    flat = Placement(placed.placement.node, Grid.of(2))
    assert Flow(flow.counts, pairs).crossing(flat.device) <= 0.5


def test_clusters_carry_their_experts_pairs():
    flow, cluster = flow_of(SKEWED), np.array([[0, 1, 1, 0, 1, 0]] * 3)
    between = clustered(flow, cluster, 2)
    assert between.sum() == flow.total
    assert between[0, 0, 1] == sum(flow.pairs[0, i, j] for i in (0, 3, 5) for j in (1, 2, 4))


def test_options():
    with pytest.raises(OptionError, match="slow >= 1 and branches >= 1"):
        MoETuner(slow=0.5)
    with pytest.raises(OptionError, match="branches=0"):
        MoETuner(branches=0)


def test_uneven_placements_run_as_one_process_and_send_what_was_counted(four_ranks):
    placed = MoETuner().place(flow_of(SKEWED), Grid.of(4)).placement
    assert not placed.even
    owner = tuple(placed.device[0].tolist())
    found = four_ranks.ask(rank_placed.run, owner)
    assert max(one["difference"] for one in found) < 1e-12
    # The engine sends every (token, slot) for itself: as if each were a token with one expert.
    expert = np.concatenate([np.array(one["expert"]).reshape(-1, 1, 1) for one in found])
    home = np.concatenate([np.full(np.array(one["expert"]).size, rank) for rank, one in enumerate(found)])
    count = len(expert)
    trace = RoutingTrace(
        expert, np.ones(expert.shape), home, np.zeros(count), np.zeros(count, bool), (6,), np.zeros(count, int)
    )
    layer = Placement(placed.device[:1], Grid.of(4))
    counted = movement(layer, trace, "home").sent[0].sum() / 2  # there; the way back is the same
    assert sum(one["sent"]["tokens.intra"]["rows"] for one in found) == counted


def figures(gain=0.05, gap=0.0):
    less = {name: {"mean": gain + 0.01, "low": gain, "high": gain + 0.02} for name in ("contiguous", "random")}
    one = {"less imbalance, held-out": less, "less busiest link, held-out": less, "largest": {"gap": gap}}
    return {f"{p} devices": one for p in experiment.DEVICES}


def test_each_condition_of_the_experiment_can_fail():
    assert experiment.holds(figures())
    assert not experiment.holds(figures(gap=0.06))
    assert not experiment.holds(figures(gain=-0.01))


def test_the_experiment_runs_small(monkeypatch):
    monkeypatch.setattr(_placing, "DOMAINS", ("arithmetic",))
    monkeypatch.setattr(_placing, "OTHERS", ("sorting",))
    monkeypatch.setattr(experiment, "SEQUENCES", 2)
    monkeypatch.setattr(experiment, "DEVICES", (2,))
    found = experiment.run((1, 2), None, lambda done, total: None)
    assert found.shown is experiment.holds(found.figures)
    fit = found.figures["2 devices"]["fit"]
    assert fit["moetuner"]["imbalance"] < fit["contiguous"]["imbalance"]
