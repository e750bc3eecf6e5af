"""The experiment's rule can fail at every condition, its positions are counted right, and it runs small."""

from types import SimpleNamespace

import torch

from moekit.lab.experiments import ds_moe_multitask as experiment


def figures(**changed):
    gaps = {f"{a} minus {b}": {"low": 0.1} for a, b in experiment.PAIRS} | {
        "scratch, same total minus aggregated": {"low": -1.0}
    }
    place = {"chi_square": 50.0, "chi_square_limit": 100.0, "in_order_is_a_step": True}
    made = {"gap": gaps, "positions": place, "gradients": 1e-9}
    for name, value in changed.items():
        for part in (gaps, place, made):
            if name in part:
                part[name] = value
    return made


def test_the_rule():
    assert experiment.holds(figures())
    for name, value in {
        "chi_square": 101.0,
        "in_order_is_a_step": False,
        "in order minus at random": {"low": 0.0},
        "scratch, same additional minus aggregated": {"low": -0.1},
        "by lot minus by use": {"low": 0.0},
        "gradients": 1e-5,
    }.items():
        assert not experiment.holds(figures(**{name: value})), name


def test_a_bias_would_be_seen(monkeypatch):
    assert experiment.positions(3)["chi_square"] < experiment.positions(3)["chi_square_limit"]
    usual = experiment.kept
    monkeypatch.setattr(experiment, "kept", lambda expert, count, room, draw=None: usual(expert, count, room))
    assert experiment.positions(3)["chi_square"] > experiment.positions(3)["chi_square_limit"]


def test_it_runs_small(monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", {**experiment.SIZES, "hidden_size": 16, "num_layers": 1})
    monkeypatch.setattr(experiment, "STEPS", dict.fromkeys(experiment.STEPS, 2))
    monkeypatch.setattr(experiment, "TOKENS", 128)
    monkeypatch.setattr(experiment, "CALIBRATION_ROWS", 2)
    rows = lambda seed, count: [torch.arange(1, 17)] * count  # noqa: E731
    judge = SimpleNamespace(loss=lambda model, seed: float(model.config.num_experts), rows=rows)
    monkeypatch.setattr(experiment, "ground", lambda: judge)
    monkeypatch.setattr(experiment, "draws", lambda *of: lambda step: {"input_ids": torch.randint(1, 255, (2, 16))})
    found = {**experiment.dropped(1), **experiment.joined(1)}
    wanted = {"by use": 4, "by lot": 4}
    assert found == {name: wanted.get(name, 8) for pair in experiment.PAIRS for name in pair}
    assert experiment.by_lot(3)("a") == experiment.by_lot(3)("b") != experiment.by_lot(4)("a")
