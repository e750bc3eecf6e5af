"""ExFlow: consecutive experts of a token together, exactly solved where that can be checked, better than chance."""

import itertools

import numpy as np
import pytest

from moekit.errors import OptionError
from moekit.lab.experiments import _placing
from moekit.lab.experiments import exflow as experiment
from moekit.parallel import _solver_bound, _solver_milp
from moekit.parallel._links import Grid
from moekit.parallel._solver import apart, every_layer
from moekit.parallel._traffic import Flow
from moekit.parallel.exflow import ExFlow
from moekit.profile import RoutingTrace


def flow_of(layers=4, experts=8, stay=0.7, tokens=3000, seed=0):
    """Tokens that follow a hidden permutation from layer to layer, mostly."""
    rng = np.random.default_rng(seed)
    now = rng.integers(0, experts, tokens)
    counts, pairs = [np.bincount(now, minlength=experts)], []
    for _ in range(layers - 1):
        followed = rng.permutation(experts)[now]
        after = np.where(rng.random(tokens) < stay, followed, rng.integers(0, experts, tokens))
        pairs.append(np.histogram2d(now, after, bins=[np.arange(experts + 1)] * 2)[0])
        counts.append(np.bincount(after, minlength=experts))
        now = after
    return Flow(np.array(counts, float), np.array(pairs))


def test_it_is_the_paper_s_programme_over_tokens():
    """The cost per token of the paper, sum over p of |x - x'| / 2, summed over tokens, is the pairs apart."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 4, (50, 3))
    pairs = np.zeros((2, 4, 4))
    for layer in range(2):
        np.add.at(pairs[layer], (tokens[:, layer], tokens[:, layer + 1]), 1)
    flow = Flow(np.ones((3, 4)), pairs)

    def paper(device):
        placed = np.eye(2)[np.array(device)[np.arange(3)[None], tokens]]
        return np.abs(np.diff(placed, axis=1)).sum() / 2

    best = min(map(paper, itertools.product(every_layer(4, 2), repeat=3)))
    for solver in ("auto", "milp"):
        placed = ExFlow(solver=solver).place(flow, Grid.of(2))
        assert paper(placed.placement.device) == best
        assert placed.value["crossing"] * flow.total == pytest.approx(best)
        assert placed.gap("crossing") == pytest.approx(0, abs=1e-9)


def test_hidden_affinity_is_found():
    """0.7 of the tokens follow a permutation: together they are, and of the others 1 / P by chance."""
    flow = flow_of()
    for devices in (2, 4):
        placed = ExFlow().place(flow, Grid.of(devices))
        assert placed.value["crossing"] == pytest.approx(0.3 * (1 - 1 / devices), abs=0.02)
        assert placed.placement.even


def test_without_affinity_nothing_is_gained():
    flow = Flow(np.ones((3, 8)), np.ones((2, 8, 8)))
    placed = ExFlow().place(flow, Grid.of(4))
    assert placed.value["crossing"] == placed.bound["crossing"] == pytest.approx(0.75)


def test_nodes_come_first_and_bounds_hold():
    flow = flow_of(stay=0.4)
    placed = ExFlow().place(flow, Grid.of(4, 2))
    flat = ExFlow().place(flow, Grid.of(4))
    halves = ExFlow().place(flow, Grid.of(2))
    assert placed.value["crossing nodes"] == pytest.approx(halves.value["crossing"])
    assert placed.bound["crossing nodes"] == pytest.approx(halves.bound["crossing"])
    assert flat.value["crossing"] <= placed.value["crossing"]
    assert placed.bound["crossing"] == pytest.approx(flat.bound["crossing"])
    for objective in placed.bound:
        assert placed.bound[objective] <= placed.value[objective] * (1 + 1e-9)


def test_bisection_halves_until_one_device_is_left():
    flow = flow_of(layers=3)
    placed = ExFlow(solver="bisection", seconds=20).place(flow, Grid.of(4))
    exact = ExFlow().place(flow, Grid.of(4))
    assert placed.placement.even
    assert exact.value["crossing"] <= placed.value["crossing"] < 0.75
    assert placed.bound["crossing"] == pytest.approx(exact.bound["crossing"])
    assert ExFlow(solver="bisection").place(flow, Grid.of(1)).value["crossing"] == 0


def test_what_it_refuses(monkeypatch):
    with pytest.raises(OptionError, match="leaves no time"):
        ExFlow(seconds=0)
    flow = flow_of(layers=2, experts=6)
    with pytest.raises(OptionError, match="6 devices cannot be halved down to one"):
        ExFlow(solver="bisection").place(flow, Grid.of(6))
    monkeypatch.setattr(_solver_milp, "solve", lambda *a, **k: None)
    with pytest.raises(OptionError, match="HiGHS found no placement in 60 s"):
        ExFlow(solver="milp").place(flow, Grid.of(2))


def test_a_planted_fault_is_seen():
    """Solving the pairs of transposed layers places worse: the direction of a pair matters."""
    flow = flow_of(stay=0.9)
    wrong = Flow(flow.counts, flow.pairs.transpose(0, 2, 1).copy())
    device = ExFlow().place(wrong, Grid.of(4)).placement.device
    assert apart(flow.pairs, device) > 2 * apart(flow.pairs, ExFlow().place(flow, Grid.of(4)).placement.device)


def figures(gap=0.01, gain=0.05, saved=2.0, cost=1.0):
    less = {name: {"mean": gain + 0.01, "low": gain, "high": gain + 0.02} for name in ("contiguous", "random")}
    one = {
        "largest gap": gap,
        "less crossing, held-out": less,
        "copies saved": saved,
        "copies for keys and values": cost,
    }
    return {f"{p} devices": one for p in experiment.DEVICES}


def test_each_condition_of_the_experiment_can_fail():
    assert experiment.holds(figures())
    assert not experiment.holds(figures(gap=0.06))
    assert not experiment.holds(figures(gain=-0.001))
    assert not experiment.holds(figures(saved=0.9))


def test_the_experiment_runs_small(monkeypatch):
    monkeypatch.setattr(_placing, "DOMAINS", ("arithmetic",))
    monkeypatch.setattr(_placing, "OTHERS", ("sorting",))
    monkeypatch.setattr(_solver_bound, "WIDEST", 8)  # a quick bound
    monkeypatch.setattr(experiment, "SEQUENCES", 2)
    monkeypatch.setattr(experiment, "DEVICES", (8,))
    found = experiment.run((1, 2), None, lambda done, total: None)
    assert found.shown is experiment.holds(found.figures)
    control, ours = found.figures[experiment.ANEW], found.figures["8 devices"]
    assert 0.5 < ours["fit"]["exflow"]["crossing"] < ours["fit"]["random"]["crossing"]
    assert control["less crossing, held-out"].keys() == ours["less crossing, held-out"].keys()


def test_shuffled_layers_leave_nothing_to_place_by():
    """Tokens keep to two groups of experts; with every layer in an order of its own the same loads tell nothing."""
    rng = np.random.default_rng(0)
    side = rng.integers(0, 2, 6000)[:, None, None]
    expert = side * 4 + rng.integers(0, 4, (6000, 3, 1))
    trace = RoutingTrace(
        expert, np.ones(expert.shape), side[:, 0, 0], side[:, 0, 0], side[:, 0, 0] > 1, (8,) * 3, side[:, 0, 0]
    )
    cut = _placing.shuffled(trace, 1)
    assert np.array_equal(Flow.of_trace(cut).counts, Flow.of_trace(trace).counts)
    half = np.arange(6000) < 3000
    for one, least, most in ((trace, 0.0, 0.0), (cut, 0.48, 0.52)):
        fit, held_out = (Flow.of_trace(one.take(np.flatnonzero(part))) for part in (half, ~half))
        assert least <= held_out.crossing(ExFlow().place(fit, Grid.of(2)).placement.device) <= most
