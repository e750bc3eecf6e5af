"""Applying a plan proves its output by loading it in a new process, which costs seconds; most tests use this one."""

from __future__ import annotations

import sys

import pytest
from applying import reload_here


@pytest.fixture
def quick_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["moekit.plan.apply"], "reload_in_fresh_process", reload_here)
