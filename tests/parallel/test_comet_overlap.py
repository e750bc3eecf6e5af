"""COMET: every order is the same layer on real ranks; the replay of a timeline, by hand."""

import pytest
import torch

from moekit.lab.experiments import comet_overlap as experiment
from moekit.lab.experiments._spread import bank
from moekit.lab.experiments._timeline import Event, replay
from moekit.parallel import Layout, ParallelError
from moekit.parallel.comet_overlap import Overlapped, _blocks, _down


@pytest.mark.parametrize("columns", range(1, 9))
def test_column_blocks_are_the_product(columns):
    whole = bank(2)
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = [(0, torch.tensor([0, 3])), (1, torch.tensor([1, 2, 4]))]
    with torch.no_grad():
        blocks = [_down(whole, hidden, group, block) for block in _blocks(6, columns)]
        wanted = _down(whole, hidden, group, slice(None))
    torch.testing.assert_close(torch.cat(blocks, 1), wanted, rtol=1e-14, atol=1e-14)


def test_every_order_on_real_ranks_is_the_engine(two_ranks, four_ranks):
    for ranks in (two_ranks, four_ranks):
        for found in ranks.ask(experiment.against_the_engine):
            assert len(found) == 4
            assert max(found.values()) < 1e-12, found


def test_a_timeline_by_hand():
    """Two ranks compute 1 s, exchange 4 bytes at 2 a second while computing 1 s more, wait, and compute 1 s."""
    logs = [[Event(1, "start", 0, 4), Event(1, "wait", 0), Event(1, "end")] for _ in range(2)]
    assert replay(logs, 2.0) == {"total": 4.0, "computing": 3.0, "exposed": 1.0}
    assert replay(logs, 4.0)["exposed"] == 0.0
    late = [logs[0], [Event(3, "start", 0, 1), Event(0, "wait", 0), Event(0, "end")]]
    assert replay(late, 2.0)["total"] == 3 + 2 + 1


def test_messages_follow_each_other_on_the_link():
    log = [Event(0, "start", 0, 2), Event(0, "start", 1, 2), Event(0, "wait", 1), Event(0, "wait", 0), Event(0, "end")]
    assert replay([log, log], 1.0)["total"] == 4.0


@pytest.mark.parametrize("options", [{"tiles": 0}, {"columns": -1}, {"layout": Layout(2, (0, 1), slices=2)}])
def test_cuts_that_cannot_be(options):
    with pytest.raises(ParallelError, match="needs 1 or more tiles, 0 or more columns, and whole experts"):
        Overlapped(None, options.pop("layout", Layout.contiguous(2, 2)), **options)


def test_rule_of_the_experiment():
    good = {"gap": {"2": 1e-15}, "pipeline_minus_comet": {"low": 0.1}, "pipeline_minus_comet_total": {"low": 0.1}}
    assert experiment.holds(good)
    assert not experiment.holds({**good, "pipeline_minus_comet": {"low": -0.1}})
    assert not experiment.holds({**good, "pipeline_minus_comet_total": {"low": -0.1}})
    assert not experiment.holds({**good, "gap": {"2": 1e-9}})
