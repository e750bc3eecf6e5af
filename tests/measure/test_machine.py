"""Cost models: laws are recovered from samples, errors are reported, and this machine can be measured."""

import json
import math
import shutil

import numpy as np
import pytest

from moekit.errors import OptionError
from moekit.measure import _link, machine
from moekit.measure.machine import INTER, INTRA, CostModel, Law

ONE = Law({"call": 1e-6, "flops": 1e-10, "nbytes": 1e-11}, 0.1, 0.2, 9)
DISK = Law({"call": 1e-4, "nbytes": 1e-9}, 0.1, 0.2, 9)
MODEL = CostModel(ONE, DISK, {INTRA: Law({"call": 1e-5, "nbytes": 2e-9}, 0.1, 0.2, 9)})


def test_an_exact_law_is_recovered():
    nbytes = [2.0**k for k in range(8, 24, 3)]
    law = Law.fit({"nbytes": nbytes}, [3e-5 + 2e-9 * n for n in nbytes])
    assert law.rates == pytest.approx({"call": 3e-5, "nbytes": 2e-9})
    assert law.error < 1e-9
    assert law.measured
    assert law(nbytes=1000) == pytest.approx(3.2e-5)
    assert law(nbytes=np.array([0.0, 1000.0])).tolist() == pytest.approx([3e-5, 3.2e-5])


def test_the_error_is_that_of_the_fit():
    """No line goes through these: the error says by how much, and no rate turns negative to hide it."""
    law = Law.fit({"nbytes": [1.0, 2.0, 3.0]}, [3.0, 1.0, 3.0])
    fitted = law(nbytes=np.array([1.0, 2.0, 3.0]))
    off = np.abs(fitted / np.array([3.0, 1.0, 3.0]) - 1)
    assert law.error == pytest.approx(off.mean())
    assert law.worst == pytest.approx(off.max())
    assert law.error > 0.3
    falling = Law.fit({"nbytes": [1.0, 2.0, 3.0]}, [3.0, 2.0, 1.0])
    assert min(falling.rates.values()) >= 0


def test_short_calls_count_as_much_as_long_ones():
    nbytes = np.array([1e2, 1e3, 1e8, 1e9])
    seconds = 1e-3 + 1e-9 * nbytes
    seconds[2:] *= [1.05, 0.95]
    assert Law.fit({"nbytes": nbytes}, seconds).rates["call"] == pytest.approx(1e-3, rel=0.02)


def test_an_expert_and_a_message():
    assert MODEL.expert(10, 4, 8) == pytest.approx(3 * (1e-6 + 2 * 10 * 32 * 1e-10 + 128 * 1e-11))
    assert MODEL.expert(np.array([0, 10]), 4, 8).shape == (2,)
    assert MODEL.message(1000) == pytest.approx(1.2e-5)
    farther = MODEL.with_link(INTER, 1e-4, 1e9)
    assert farther.message(1000, INTER) == pytest.approx(1.01e-4)
    assert not farther.links[INTER].measured
    assert math.isnan(farther.links[INTER].error)
    assert MODEL.links.keys() == {INTRA}


def test_it_round_trips_through_json():
    again = CostModel.of_dict(json.loads(json.dumps(MODEL.as_dict())))
    assert again == MODEL


def test_errors():
    with pytest.raises(OptionError, match="no 'inter' link"):
        MODEL.message(1, INTER)
    with pytest.raises(OptionError, match="counts nbytes: it was asked for flops"):
        DISK(flops=1)
    with pytest.raises(OptionError, match="1 samples cannot give 2 rates"):
        Law.fit({"nbytes": [1.0]}, [1.0])
    with pytest.raises(OptionError, match="longer than 0 s"):
        Law.fit({"nbytes": [1.0, 2.0]}, [1.0, 0.0])
    with pytest.raises(OptionError, match="both must be positive"):
        MODEL.with_link(INTER, 1e-4, 0)


def test_this_machine_can_be_measured(tmp_path):
    found = CostModel.fit(tmp_path, quick=True)
    for law in (found.product, found.disk, found.links[INTRA]):
        assert law.measured
        assert all(rate >= 0 and math.isfinite(rate) for rate in law.rates.values())
        assert any(rate > 0 for rate in law.rates.values())
        assert 0 <= law.error <= law.worst
    assert list(tmp_path.iterdir()) == []
    assert found.message(1 << 30) > found.message(1 << 10)


def test_reads_past_the_page_cache_read_what_is_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    seen = []
    real = machine.os.preadv
    monkeypatch.setattr(machine.os, "preadv", lambda f, b, offset: seen.append(real(f, b, offset)))
    read = machine._reader(path, 1 << 14)
    for _ in range(9):
        read()
    assert seen == [1 << 14] * 9


def test_processes_that_fail_are_reported(monkeypatch):
    monkeypatch.setattr(_link.sys, "executable", shutil.which("false"))
    with pytest.raises(OptionError, match=r"could not exchange messages \(no reason given\)"):
        _link.round_trips([8], 1)
