"""More speed asked for, fewer bytes; more memory, more of them; and the ends are what they must be."""

import math

import pytest

from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError, OptionError
from moekit.lab import text
from moekit.plan.sizes import fixed_nbytes, source_nbytes
from moekit.profile import profile
from moekit.run.weigh import read_rate, weigh

RATE = 1e9


@pytest.fixture(scope="module")
def source():
    return Checkpoint.open("moekit:mini")


@pytest.fixture(scope="module")
def seen(source):
    return profile(source, {"python": [text("python", "calibration", 2000)]}, sequence_length=128, sample=0)


def test_speed_and_memory_pull_apart(source, seen):
    memory = source_nbytes(source) // 2
    sizes = [weigh(source, seen, memory, speed, RATE).nbytes for speed in (20.0, 60.0, 200.0, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == memory
    assert sizes[0] > memory
    more = weigh(source, seen, int(1.2 * memory), 60.0, RATE)
    assert more.nbytes >= sizes[1]


def test_what_is_promised_is_what_replay_counts(source, seen):
    found = weigh(source, seen, source_nbytes(source) // 2, 60.0, RATE)
    assert found.speed >= 60.0
    assert found.experts < found.all_experts
    assert "tokens/s at most" in str(found)


def test_where_all_fits_nothing_is_paged(source, seen):
    found = weigh(source, seen, 2 * source_nbytes(source), 5.0, RATE)
    assert (found.nbytes, found.speed) == (source_nbytes(source), math.inf)
    assert "not needed" in str(found)


def test_a_slow_disk_leaves_less(source, seen):
    memory = source_nbytes(source) // 2
    assert weigh(source, seen, memory, 60.0, RATE / 10).nbytes <= weigh(source, seen, memory, 60.0, RATE).nbytes


def test_the_disk_is_measured(source):
    assert read_rate(source) > 1e6


def test_errors(source, seen):
    with pytest.raises(OptionError, match="give one above 0"):
        weigh(source, seen, 10**9, 0.0, RATE)
    with pytest.raises(BudgetError, match="what surrounds the experts"):
        weigh(source, seen, fixed_nbytes(source), 1.0, RATE)
