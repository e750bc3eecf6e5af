"""`moekit tune` measures, keeps the best for the model, and `run` uses it."""

import json

import pytest
from commanding import call

from moekit.checkpoint import Checkpoint
from moekit.run import defaults, load, paging, policies
from moekit.run._policies_arc import ARC
from moekit.run.defaults import Choice


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_measures_every_policy_in_every_regime_and_keeps_the_best(model, text, tmp_path):
    drawn = tmp_path / "speed.html"
    options = ("--prompts", 1, "--prompt-tokens", 6, "--new-tokens", 2)
    code, out, _ = call("tune", model, "--text", text, *options, "--curve", drawn, "--json")
    found = json.loads(out)
    assert code == 0
    assert {one["choice"]["policy"] for one in found["measured"]} == set(policies())
    assert {one["regime"] for one in found["measured"]} == {"cold", "warm", "rotating"}
    assert len(found["measured"]) == 2 * 3 * len(policies())
    mean = {}
    for one in found["measured"]:
        key = (one["choice"]["policy"], one["choice"]["ahead"])
        mean[key] = mean.get(key, 0) + one["seconds"]
    assert (found["best"]["policy"], found["best"]["ahead"]) == min(mean, key=mean.get)
    assert defaults.remembered(Checkpoint.open(model)) == Choice(**found["best"])
    assert "<polyline" in drawn.read_text()
    assert [point["share"] for point in found["curve"]] == [1.0, 0.5, 0.25, 0.125]


def test_what_was_found_is_used(model):
    checkpoint = Checkpoint.open(model)
    defaults.remember(checkpoint, Choice("arc", 2))
    opened = load(checkpoint)
    assert paging(opened).width == 2
    used = paging(opened).store.policy
    assert isinstance(getattr(used, "inner", used), ARC)
    defaults.folder().joinpath(f"{checkpoint.fingerprint}.json").write_text("{")
    assert defaults.remembered(checkpoint) is None


def test_bad_input(refused, model, text):
    refused("tune", model, naming="give --text FILE")
    refused("tune", model, "--text", text, "--curve", "speed.pdf", naming="must end in .html or .png")
