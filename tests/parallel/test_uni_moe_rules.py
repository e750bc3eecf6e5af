"""The experiment's modalities, figures and rule, and that it runs small."""

import math

import numpy as np
import pytest
import torch

from moekit.lab.experiments import uni_moe as experiment


def test_the_rule():
    def figures(**changed):
        loss = {f"{n} minus staged": {"low": 0.1} for n in (experiment.COPIES, experiment.DENSE)}
        spread = {f"{experiment.DENSE} minus staged": {"low": 0.1}}
        for name, value in changed.items():
            (spread if name == "spread" else loss)[f"{value} minus staged"] = {"low": 0.0}
        return {"loss gap": loss, "spread gap": spread}

    assert experiment.holds(figures())
    assert not experiment.holds(figures(loss=experiment.COPIES))
    assert not experiment.holds(figures(loss=experiment.DENSE))
    assert not experiment.holds(figures(spread=experiment.DENSE))


def test_prompts_are_a_function_of_seed_and_step():
    scene = experiment.Scene(3)
    one, same, other = (scene.batch(1, step, experiment.MODALITIES, 6) for step in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["letters"], other["letters"])
    assert one["modality"].tolist() == [0, 1, 2, 0, 1, 2]
    assert scene.batch(1, 0, ("signal",), 3)["modality"].tolist() == [2, 2, 2]


def test_a_shown_letter_is_itself_up_to_what_its_modality_hides():
    scene, draw = experiment.Scene(3), torch.Generator().manual_seed(1)
    letters = torch.tensor([4, 4])
    codes, grids, waves = (scene.raw(m, letters, draw) for m in range(3))
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(grids[0].sort().values, grids[1].sort().values)
    assert not torch.equal(grids[0], grids[1])
    torch.testing.assert_close(torch.fft.rfft(waves[0]).abs(), torch.fft.rfft(waves[1]).abs(), atol=1e-4, rtol=0)
    assert int(torch.fft.rfft(waves[0]).abs().argmax()) == 5


@pytest.mark.parametrize(
    ("table", "bits"), [(np.eye(3), math.log2(3)), (np.ones((3, 3)), 0.0), (np.array([[2.0, 0], [1, 1]]), 0.311278)]
)
def test_bits_that_experts_tell(table, bits):
    assert experiment._mutual(table) == pytest.approx(bits, abs=1e-5)


def test_it_runs_small(monkeypatch):
    monkeypatch.setattr(experiment, "STEPS", dict.fromkeys(experiment.STEPS, 1))
    monkeypatch.setattr(experiment, "ROWS", 3)
    monkeypatch.setattr(experiment, "TEST", 3)
    found, told = experiment.contest(1)
    assert set(found) == {experiment.STAGED, experiment.COPIES, experiment.DENSE, experiment.LAST}
    assert all(set(by) == set(experiment.MODALITIES) and min(by.values()) > 0 for by in found.values())
    assert all(0 <= bits <= math.log2(3) for bits in told.values())
