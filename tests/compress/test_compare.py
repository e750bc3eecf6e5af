"""Methods at equal bytes: the budget holds, the figures are what measuring says, and contestants come once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.cli import _pareto
from moekit.cli._app import app
from moekit.compress import Arena, _compare, compare
from moekit.compress._arena import evenly
from moekit.compress._compare import Entry, contestants
from moekit.errors import OptionError
from moekit.plan import LiveLoss
from moekit.profile import Profile, profile
from moekit.stream import LoadedModel

TEXT = {domain: [lab.text(domain, "calibration", 1024, 1)] for domain in ("prose", "sorting")}
METHODS = ("reap", "random/rtn:bits=8", "rtn:bits=4", "rtn")


class Texts:
    def __init__(self, runner: LoadedModel, tokenizer: object) -> None:
        self.runner, self.tokenizer = runner, tokenizer

    def profile(self, seed: int) -> Profile:
        options = {"held_out": 0.5, "seed": seed, "sample": 16, "sequence_length": 128}
        return profile(self.runner, TEXT, tokenizer=self.tokenizer, **options)

    def choosing(self, seed: int) -> Sequence[np.ndarray]:
        return [np.asarray(piece) for pieces in self.profile(seed).held_out.values() for piece in pieces][:1]

    def judging(self, seed: int) -> Mapping[str, Sequence[np.ndarray]]:
        return {domain: [np.asarray(pieces[-1])] for domain, pieces in self.profile(seed).held_out.items()}


@pytest.fixture(scope="module")
def arena() -> Arena:
    source = Checkpoint.open("moekit:mini")
    runner = LoadedModel.load(source, dtype=torch.float32)
    return Arena(source, runner, Texts(runner, source.tokenizer()))


def test_every_contestant_keeps_the_budget_and_is_measured_as_it_is(arena: Arena) -> None:
    found = compare(arena, METHODS[:2], (0.5,), (1,))
    names = [row.method for row in found.rows()]
    assert set(names) == {*METHODS[:2], *contestants(())}
    assert all(row.nbytes <= 0.5 * found.source_nbytes for row in found.rows())
    losses = [row.kl.mean for row in found.rows()]
    assert losses == sorted(losses)
    entry = next(e for e in found.entries if e.method == "reap")
    plan = arena.plan(entry.setting, 1)
    judge = LiveLoss(arena.runner, arena.source, arena._judging(1)["prose"])
    assert judge(plan) == pytest.approx(entry.domains["prose"], rel=1e-6)
    judge.restore()
    kept = int(entry.setting.partition("keep=")[2])
    more = arena.plan(f"reap:keep={kept + 1}", 1)
    assert arena.nbytes(more) > 0.5 * arena.whole_bytes


def test_what_does_not_fit_is_said(arena: Arena) -> None:
    found = compare(arena, ["rtn:bits=8"], (0.9,), (1,))
    assert ("rtn:bits=8", 0.9) in found.left_out
    assert {"method": "rtn:bits=8", "ratio": 0.9} in found.to_json()["left_out"]


def test_a_run_that_was_broken_off_goes_on(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Entry] = []
    methods, ratios = ("rtn:bits=8", "rtn"), (0.25, 0.5)
    monkeypatch.setattr(_compare, "BASELINES", ())
    found = compare(arena, methods, ratios, (1,), keep=kept.append)
    assert [entry.key for entry in kept] == [(name, ratio, 1) for ratio in ratios for name in methods]
    assert [(entry.method, entry.ratio) for entry in kept if entry.setting is None] == [("rtn:bits=8", 0.5)]
    some = [replace(entry, domains={"prose": 7.0}) for entry in kept[:1]] + kept[1:3]
    monkeypatch.setattr(Arena, "within", lambda self, spec, seed, budget: made.append(spec) or None)
    made: list[str] = []
    again = compare(arena, methods, ratios, (1,), known=some)
    assert made == ["rtn"]
    assert again.left_out == (("rtn:bits=8", 0.5), ("rtn", 0.5))
    assert again.entries == tuple(some[:2])
    assert found.entries[1:2] == again.entries[1:]


def test_those_that_choose_are_thinned_evenly() -> None:
    sequences = [np.full(10, n) for n in range(8)]
    assert [int(one[0]) for one in evenly(sequences, 20)] == [0, 4]
    assert [int(one[0]) for one in evenly(sequences, 500)] == list(range(8))


def test_pages_hold_every_method(arena: Arena, tmp_path) -> None:
    found = compare(arena, ["reap"], (0.25, 0.5), (1,), model="a <model>")
    _pareto.write(found, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "a &lt;model&gt;" in page
    for row in found.rows():
        assert page.count(f"<td>{row.method}</td>") == sum(r.method == row.method for r in found.rows())
    assert (tmp_path / "out" / "compare.json").exists()
    assert (tmp_path / "out" / "compare.png").exists() == _pareto.can_plot()


def test_contestants_come_once_and_are_known() -> None:
    assert contestants(["rtn", "rtn", "reap"])[:2] == ["rtn", "reap"]
    assert contestants(["rtn"]).count("rtn") == 1
    with pytest.raises(OptionError, match="unknown method 'reep'"):
        contestants(["reep"])


def test_ratios_are_shares(arena: Arena) -> None:
    with pytest.raises(OptionError, match=r"ratio 1\.5 is no share of the bytes to remove"):
        compare(arena, ["rtn"], (1.5,), (1,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--with", "reap"], "no text to calibrate and judge on"),
        (["--text", "x"], "nothing to compare"),
        (["--with", "reap", "--text", "x", "--ratio", "half"], "--ratio half is no list of shares"),
    ],
)
def test_command_line_mistakes(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["compare", "moekit:mini", *arguments])
    assert message in str(result.exception)
