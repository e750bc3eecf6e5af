"""The dense model's folder, and outputs loaded again in this process."""

import importlib

import pytest
from building import dense

from reloading import reload_here


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("build") / "dense"
    dense().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _reload_here(monkeypatch):
    for module in ("moekit.plan.apply", "moekit.build._write"):
        monkeypatch.setattr(importlib.import_module(module), "reload_in_fresh_process", reload_here)
