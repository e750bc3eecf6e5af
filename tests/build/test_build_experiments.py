"""Experiments of the builders: each condition of each rule can fail, and what they share is what it says."""

import pytest
import torch

from moekit import lab
from moekit.lab.experiments import efficientllm, llava_mod, mote_ternary, sparse_unified
from moekit.lab.experiments._building import gap, keep_units
from moekit.train.sequences import targets

SPLIT = {"whole": 1.0, "static": 1.5, "static-tuned": 1.35, "untrained": 1.6, "frozen": 1.4, "full": 1.2}
TERNARY = {
    "dense": 1.5,
    "full": 1.2,
    "full-rounded": 3.0,
    "shared-full": 1.2,
    "shared-rounded": 1.4,
    "shared-full-2": 1.35,
    "mote": 1.3,
    "mote-14": 1.3,
}
SCRATCH = {"dense-one": 2.5, "dense-active": 2.3, "dense-total": 2.0, "sparse": 2.2}
STUDENTS = {"dense+lm": 0.9, "dense+kd": 0.6, "moe+lm": 0.8, "moe+kd": 0.5}


def over_seeds(figures, **changes):
    """Three seeds with a little noise that all contestants share, and less that they do not."""
    values = figures | {name.replace("_", "-"): value for name, value in changes.items()}
    return [
        {name: value + 0.1 * seed + 0.001 * (seed * i % 3) for i, (name, value) in enumerate(values.items())}
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({}, True), ({"static": 1.4}, False), ({"static_tuned": 1.1}, False), ({"frozen": 1.2}, False)],
)
def test_sparse_unified(changes, shown):
    figures = sparse_unified.summary(over_seeds(SPLIT, **changes))
    assert sparse_unified.holds(figures) is shown
    assert figures["bits_per_byte"]["full"]["mean"] == pytest.approx(1.3, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, True),
        ({"full_rounded": 1.3}, False),
        ({"shared_rounded": 1.3}, False),
        ({"shared_full_2": 1.25}, False),
        ({"full": 1.6}, True),  # decides nothing
    ],
)
def test_mote_ternary(changes, shown):
    assert mote_ternary.holds(mote_ternary.summary(over_seeds(TERNARY, **changes))) is shown


@pytest.mark.parametrize(("changes", "shown"), [({}, True), ({"dense+kd": 0.5}, False), ({"moe+lm": 0.4}, False)])
def test_llava_mod(changes, shown):
    answers = {"teacher": 1.0, "before": 0.9}
    kl = over_seeds(STUDENTS | changes)
    found = [{"kl": one, "bits_per_byte": STUDENTS, "right_answers": answers} for one in kl]
    assert llava_mod.holds(llava_mod.summary(found)) is shown


@pytest.mark.parametrize(
    ("changes", "size", "shown"), [({}, 2, True), ({"dense_active": 2.2}, 2, False), ({}, 1, False)]
)
def test_efficientllm(changes, size, shown):
    reports = {"sparse": {"tensor_bytes": size}, "dense-active": {"tensor_bytes": 1}}
    assert efficientllm.holds(efficientllm.summary(over_seeds(SCRATCH, **changes), reports)) is shown


def test_differences_are_taken_seed_by_seed():
    found = gap([{"a": 1.0, "b": 0.5}, {"a": 5.0, "b": 4.5}], "a", "b")
    assert (found["mean"], found["low"], found["high"]) == (0.5, 0.5, 0.5)


def test_batches_follow_from_seed_and_step():
    one, other = lab.mixture(3, 128, 32), lab.mixture(4, 128, 32)
    assert one(2)["input_ids"].shape == (4, 33)
    assert torch.equal(one(2)["input_ids"], lab.mixture(3, 128, 32)(2)["input_ids"])
    assert not torch.equal(one(2)["input_ids"], other(2)["input_ids"])
    ids, weight = targets(one(0))
    assert ids.shape == weight.shape == (4, 32)


def test_pairs_differ_in_one_character_of_the_answer():
    train, test = llava_mod.pairs("train", 30, 1), llava_mod.pairs("test", 30, 1)
    for prompt, better, worse in train:
        assert len(better) == len(worse)
        assert sum(a != b for a, b in zip(better, worse, strict=True)) == 1
        assert better[-1] == worse[-1] == ord("\n")
        assert bytes(prompt)
    assert not {bytes(prompt) for prompt, _, _ in train} & {bytes(prompt) for prompt, _, _ in test}


def test_the_static_half_is_the_best_half():
    class FFN:
        module = torch.nn.Module()

    for name, shape in (("gate_proj", (6, 2)), ("up_proj", (6, 2)), ("down_proj", (2, 6))):
        setattr(FFN.module, name, torch.nn.Linear(shape[1], shape[0], bias=False))
    before = FFN.module.down_proj.weight.clone()
    keep_units(FFN, torch.tensor([5, 0, 2]))
    assert torch.equal(FFN.module.down_proj.weight, before[:, [5, 0, 2]])
    assert FFN.module.gate_proj.weight.shape == (3, 2)
