"""The script behind docs/compression.md: points outlive a broken run, and the page says what was measured."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from moekit.compress._compare import Comparison, Entry

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compression.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("compression", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POINTS", tmp_path / "points.json")
    return module


def entry(method: str, kl: float | None, seed: int = 1, ratio: float = 0.5) -> Entry:
    domains = {} if kl is None else {"prose": kl, "c": 3 * kl}
    setting = None if kl is None else f"{method}:keep={seed}|1"
    return Entry(method, setting, ratio, seed, 2_500_000, domains, 30.0)


def test_points_outlive_a_broken_run(script: ModuleType) -> None:
    points = script.Points("a model", [])
    assert points.entries == []
    kept = [entry("reap", 0.5), entry("rtn", None), entry("fit", 0.1)]
    for one in kept:
        points.keep(one)
    assert script.Points("a model", []).entries == kept
    assert script.Points("a model", ["fit", "rtn"]).entries == kept[:1]
    assert script.Points("another model", []).entries == []
    assert json.loads(script.POINTS.read_text())["fingerprint"] == "a model"


def test_the_page_has_every_method_least_loss_first(script: ModuleType) -> None:
    entries = (entry("reap", 0.5), entry("reap", 0.7, 2), entry("fit", 0.1), entry("fit", 0.2, 2))
    found = Comparison("moekit:mini", "f", 5_000_000, (0.5,), (1, 2), entries, (("rtn", 0.5),))
    page = script.document(found, 12.4, "python benchmarks/compression.py")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| fit") or line.startswith("| reap")]
    assert [row[0] for row in rows] == ["| fit", "| reap"]
    assert rows[0][1] == "`fit:keep=1/1`"
    assert rows[1][3].startswith("1.2 [")
    assert rows[1][4:] == ["0.6", "1.8 |"]
    assert "No setting is that small: rtn." in page
    assert "No method within this budget is below `fit`." in page
    assert "0 of its 2 plans store any factors" in page
    assert "`python benchmarks/compression.py`" in page
    assert "12 minutes for all points" in page
    assert "seeds 1, 2 draw both" in page
    assert str(Path.home()) not in page


def test_who_is_below_fit_is_said(script: ModuleType) -> None:
    entries = (entry("reap", 0.05), entry("rtn", 0.1), replace(entry("fit", 0.1), setting="solver, with low rank"))
    page = script.document(Comparison("m", "f", 5_000_000, (0.5,), (1,), entries, ()), 1, "")
    assert "Below `fit`: reap (0.1 against 0.2)." in page
    assert "1 of its 1 plans store any factors" in page
    alone = script.document(Comparison("m", "f", 5_000_000, (0.5,), (1,), entries[:2], ()), 1, "")
    assert "fit" not in alone.partition("## 50%")[2]
