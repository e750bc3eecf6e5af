"""Experiments: the rule decides from the figures, each of its conditions can fail, and a small run goes through."""

import copy

import pytest

from moekit import systems
from moekit.errors import OptionError, TextError
from moekit.lab import experiments
from moekit.lab.experiments import easy_ep


def result(ours=0.1, frequency=0.2, probability=0.2, draw=0.9, jaccard=0.9):
    losses = {"easy-ep": ours, "frequency": frequency, "router-probability": probability, "random": draw}
    whole = {name: 2.0 + increase for name, increase in losses.items()}
    return {"whole": 2.0, "half": whole, "quarter": whole, "jaccard": jaccard}


def trials(**changes):
    """Three domains, three seeds, a little noise; `changes` go into every run."""
    runs = [result(**{"ours": 0.1 + 0.001 * seed, **changes}) for seed in range(3)]
    return {domain: copy.deepcopy(runs) for domain in ("a", "b", "c")}


def test_the_figures_are_means_over_domains_with_intervals_over_seeds():
    figures = easy_ep.summary(trials())
    gap = figures["half"]["gap"]["frequency"]
    assert gap["mean"] == pytest.approx(0.099)
    assert gap["low"] < gap["mean"] < gap["high"]
    assert figures["half"]["increase"]["a"]["easy-ep"]["mean"] == pytest.approx(0.101)
    assert figures["half"]["domains_below_frequency"] == figures["half"]["domains"] == 3
    assert figures["jaccard"]["mean"] == pytest.approx(0.9)
    assert easy_ep.holds(figures)


@pytest.mark.parametrize(
    "changes",
    [
        {"frequency": 0.101},  # a tie over the seeds
        {"frequency": 0.05},
        {"probability": 0.1},
        {"draw": 0.1},
        {"jaccard": 0.79},
    ],
)
def test_each_condition_can_fail(changes):
    assert not easy_ep.holds(easy_ep.summary(trials(**changes)))


def test_most_domains_must_agree():
    found = trials()
    for domain in ("a", "b"):
        for run in found[domain]:
            run["half"]["frequency"] = run["half"]["easy-ep"] - 0.001
    for run in found["c"]:
        run["half"]["frequency"] = 9.0
    figures = easy_ep.summary(found)
    assert figures["half"]["gap"]["frequency"]["low"] > 0
    assert figures["half"]["domains_below_frequency"] == 1
    assert not easy_ep.holds(figures)


def test_a_quarter_decides_nothing():
    found = trials()
    for runs in found.values():
        for run in runs:
            run["quarter"] = {name: -value for name, value in run["quarter"].items()}
    assert easy_ep.holds(easy_ep.summary(found))


def test_own_text_is_split_without_overlap():
    text = "".join(f"{number:07d} " for number in range(4000))
    pieces, (test,) = easy_ep._own_text(text, seed=3)
    assert len(pieces) == min(easy_ep.FEW + easy_ep.MANY, len(text) * 7 // 10 // easy_ep.LENGTH)
    assert len(test) == easy_ep.TEST_BYTES
    assert max(int(word) for piece in pieces for word in piece.split() if len(word) == 7) < int(test.split()[1])
    assert easy_ep._own_text(text, seed=3) == (pieces, [test])
    assert easy_ep._own_text(text, seed=4)[0] != pieces


def test_a_small_run_with_own_text(monkeypatch, tmp_path):
    """All the machinery at a size too small to mean anything."""
    for name, value in {"FEW": 4, "MANY": 6, "LENGTH": 64, "TEST_BYTES": 512, "DRAWS": 1}.items():
        monkeypatch.setattr(easy_ep, name, value)
    monkeypatch.setattr(easy_ep, "DOMAINS", ("arithmetic",))
    path = tmp_path / "mine.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    told = []
    found = experiments.run("easy-ep", (1, 2), path, lambda done, total: told.append((done, total)))
    assert found["key"] == "easy-ep"
    assert found["verdict"] in ("shown", "not-shown")
    assert (found["verdict"] == "shown") is easy_ep.holds(found["figures"])
    assert set(found["figures"]["half"]["increase"]) == {"arithmetic", "own"}
    assert found["seeds"] == [1, 2]
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    losses = found["figures"]["half"]["increase"]["own"]
    assert losses["random"]["mean"] != losses["easy-ep"]["mean"]


def test_what_has_no_experiment(tmp_path):
    key = next(
        row.key for row in systems.records() if row.outcome == "planned" and row.key not in experiments.available()
    )
    with pytest.raises(OptionError, match=rf"{key} has no experiment yet \(it is planned\): choose .*easy-ep"):
        experiments.run(key)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(TextError, match="9 bytes: an experiment needs 4096"):
        experiments.run("easy-ep", text=short)
