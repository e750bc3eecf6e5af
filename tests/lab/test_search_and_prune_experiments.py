"""The rules of the experiments on DERN, EEP, PreMoe and super experts: each condition can fail."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from moekit.checkpoint import Checkpoint
from moekit.lab.experiments import dern, eep, premoe, super_experts
from moekit.lab.experiments._trial import by_method
from moekit.plan import LayerPlan
from moekit.plan.document import StoredExpert

SEEDS = np.array([0.0, 0.001, 0.002])


def figures(ours: str, **losses: float) -> dict[str, Any]:
    """Losses of three seeds with a little noise."""
    return by_method(
        {name.replace("_", " "): (SEEDS * (1 + i) + loss).tolist() for i, (name, loss) in enumerate(losses.items())},
        ours,
    )


def test_dern_must_beat_plain_pruning_and_both_averagings() -> None:
    names = {dern.OURS: 0.1, dern.PLAIN: 0.2, dern.AVERAGES: 0.3, "grouped averages": 0.3}
    assert dern.holds(figures(dern.OURS, **names))
    for worse in (dern.PLAIN, dern.AVERAGES, "grouped averages"):
        assert not dern.holds(figures(dern.OURS, **(names | {worse: 0.1})))


def test_dern_counts_the_neurons_that_found_a_home() -> None:
    experts = (StoredExpert(((0, 1.0), (2, 0.25), (3, 0.5))), StoredExpert(((1, 1.0), (2, 0.25))))
    layer = LayerPlan(num_experts=4, experts=experts, slots=(0, 1), rows=(((0, 1.0),), ((1, 1.0),)))
    assert dern.adopted({"layer": layer}) == 0.5


def test_eep_must_beat_best_of_random_and_not_lose_by_merging() -> None:
    names = {eep.MERGED: 0.1, eep.PRUNED: 0.1, eep.BEST: 0.2, eep.RANDOM: 0.3}

    def found(**changes: float) -> dict[str, Any]:
        errors = figures(eep.MERGED, **(names | changes))
        for one in errors.values():
            one["error"] = one.pop("kl")
        return {"error": errors}

    assert eep.holds(found())
    for changes in ({eep.BEST: 0.1}, {eep.RANDOM: 0.05}, {eep.PRUNED: 0.05}):
        assert not eep.holds(found(**changes))


def test_premoe_must_find_the_task_and_serve_it_best() -> None:
    names = {premoe.RIGHT: 0.1, premoe.WRONG: 0.5, premoe.FREQUENCY: 0.4, premoe.RANDOM: 0.9}
    good = {"retrieved": {"mean": 0.96}, "half": figures(premoe.RIGHT, **names)}
    assert premoe.holds(good)
    assert not premoe.holds(good | {"retrieved": {"mean": 0.95}})
    for tied in (premoe.WRONG, premoe.FREQUENCY, premoe.RANDOM):
        assert not premoe.holds(good | {"half": figures(premoe.RIGHT, **(names | {tied: 0.1}))})


@pytest.mark.parametrize("change", [{"named": []}, {"silenced": 0.2}, {"random": [0.1, 0.6]}])
def test_super_experts_must_be_named_and_matter_most_in_every_seed(change: dict[str, Any]) -> None:
    runs = [{"named": ["layer: 3"], "silenced": 0.5, "random": [0.1, 0.2]} for _ in range(3)]
    assert super_experts.holds(runs)
    changed = copy.deepcopy(runs)
    changed[1] |= change
    assert not super_experts.holds(changed)


def test_planting_multiplies_one_output_and_draws_are_of_early_layers() -> None:
    source = Checkpoint.open("moekit:mini")
    names = super_experts.early(source)
    assert len(names) == round(0.75 * len(source.moe_layers))
    drawn = super_experts.drawn(source, 5, np.random.default_rng(0))
    assert len(set(drawn)) == 5
    assert {name for name, _ in drawn} <= set(names)
    values = super_experts.planted(source, names[1], 3).layers[names[1]].values
    assert values is not None
    before, after = source.bank(names[1]).down, values.bank().tensors()["down"]
    assert (after[3] == before[3] * super_experts.TIMES).all()
    assert (after[:3] == before[:3]).all()
