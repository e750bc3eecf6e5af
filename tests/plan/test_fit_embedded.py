"""Fit on the embedded model, small: one seed, one ratio, against every single method on text nobody had seen."""

from __future__ import annotations

import pytest

from moekit.checkpoint import Checkpoint
from moekit.lab.experiments import fit_frontier


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_frontier, "DOMAINS", ("python", "arithmetic"))
    monkeypatch.setattr(fit_frontier, "CALIBRATION_BYTES", 4096)
    monkeypatch.setattr(fit_frontier, "CHOOSING_TOKENS", 1024)
    monkeypatch.setattr(fit_frontier, "TEST_BYTES", 1024)


@pytest.mark.usefixtures("small")
def test_fit_is_not_worse_than_any_single_method_at_half_the_bytes() -> None:
    losses = fit_frontier.Trial(Checkpoint.open("moekit:mini")).measure(11, ratios=(0.5,))["0.5"]
    assert {"rtn:bits=4", "reap", "easy-ep", "frequency", "m-smoe"} <= set(losses)
    assert losses["fit"] <= min(losses.values()) * 1.2
    assert losses["fit"] < losses["reap"] / 10


def test_the_rule_is_what_the_docstring_says() -> None:
    better, tied, worse = [0.2, 0.3, 0.25], [0.1, 0.12, 0.09], [0.01, 0.011, 0.012]
    runs = [{"fit": 0.1, "reap": a, "rtn:bits=4": b, "magic": c} for a, b, c in zip(better, tied, worse, strict=True)]
    assert fit_frontier.holds(
        {"0.5": fit_frontier.summary([{k: v for k, v in r.items() if k != "magic"} for r in runs])}
    )
    assert not fit_frontier.holds({"0.5": fit_frontier.summary(runs)})
