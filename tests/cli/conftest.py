"""A tiny model on disk, some text, and a profile of it, made once."""

import importlib

import pytest
from commanding import call, make_model, tree

from moekit import lab
from reloading import reload_here


@pytest.fixture(autouse=True)
def _reload_here(monkeypatch):
    """Outputs are loaded again in this process; that a new one loads them too is tested in tests/plan."""

    # By module: `moekit.plan.apply` as an attribute is the function of that name.
    monkeypatch.setattr(importlib.import_module("moekit.plan.apply"), "reload_in_fresh_process", reload_here)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text(lab.text("arithmetic", "calibration", 6000))
    return path


@pytest.fixture(scope="session")
def profile(tmp_path_factory, model, text):
    path = tmp_path_factory.mktemp("profile") / "tiny.profile"
    code, _, err = call("profile", model, "--text", text, "--output", path)
    assert (code, err) == (0, "")
    return path


@pytest.fixture
def refused(tmp_path):
    """Check that a command is refused as it should be: exit code 2, one line, nothing written."""

    def check(*arguments, naming):
        before = tree(tmp_path)
        code, out, err = call(*arguments)
        assert code == 2, err
        assert out == ""
        assert err.startswith("moekit: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert "Traceback" not in err
        for word in [naming] if isinstance(naming, str) else naming:
            assert word in err, err
        assert tree(tmp_path) == before

    return check
