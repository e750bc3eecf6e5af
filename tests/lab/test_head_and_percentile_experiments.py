"""Experiments on routed heads and numbers of experts by depth: contestants fit together, rules can fail, probes run."""

from __future__ import annotations

import pytest
import torch

from figures import changed
from moekit.lab.experiments import _league, dynamoe, hydra, moh
from moekit.nn import MoekitConfig, MoekitForCausalLM


def about(value, spread=0.01):
    return {"mean": value, "low": value - spread, "high": value + spread, "n": 3}


HEADS = {"minus_all_heads": {"75 %": about(0.0)}, "random - norm": about(0.1)}
DEPTHS = {"uniform_minus": {"descending": about(0.1), "ascending": about(0.0)}, "deviation_of_seeds": 0.05}

HYBRID = {
    "chunks - tokens": about(0.0),
    "shared expert - chunks": about(0.1),
    "late_branch": {"no attention at 0.15": about(0.0)},
    "at 1 - at 0.15": about(0.1),
}


@pytest.mark.parametrize("module", [moh, dynamoe])
def test_contestants_fit_together(module):
    for recipe in module.arms().values():
        assert recipe.build()


@pytest.mark.parametrize(
    ("module", "right", "where", "value"),
    [
        (moh, HEADS, ["minus_all_heads", "75 %"], about(0.005, 0.001)),
        (moh, HEADS, ["minus_all_heads", "75 %"], about(0.02, 0.05)),
        (moh, HEADS, ["random - norm"], about(0.0)),
        (dynamoe, DEPTHS, ["uniform_minus", "descending"], about(0.0)),
        (dynamoe, DEPTHS, ["deviation_of_seeds"], 0.2),
        (hydra, HYBRID, ["chunks - tokens"], about(0.1)),
        (hydra, HYBRID, ["shared expert - chunks"], about(0.0)),
        (hydra, HYBRID, ["late_branch", "no attention at 0.15"], about(0.02)),
        (hydra, HYBRID, ["at 1 - at 0.15"], about(0.0)),
    ],
)
def test_each_condition_can_fail(module, right, where, value):
    assert module.holds(right)
    assert not module.holds(changed(right, where, value))


def test_either_order_of_depths_will_do():
    assert dynamoe.holds(changed(changed(DEPTHS, ["uniform_minus", "descending"], about(-1.0)),
                                 ["uniform_minus", "ascending"], about(0.1)))  # fmt: skip


def test_masks_take_the_same_number_of_heads_from_every_token(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_league, "TEST_BYTES", 256)
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 16, "moe_intermediate_size": 4, "num_experts": 4}
    model = MoekitForCausalLM(MoekitConfig(**sizes, num_hidden_layers=2, **moh.HEADS)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = moh.masked(model, 1)
    assert set(found) == {"as it is", "norm", "random"}
    assert len(set(found.values())) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_loss_strays_from_its_trend():
    falling = {"course": {"cross_entropy": [3.0 - 0.1 * step for step in range(30)]}}
    jumping = {"course": {"cross_entropy": [3.0 - 0.1 * step + 0.5 * (step % 2) for step in range(30)]}}
    assert dynamoe.fluctuation([falling]) == 0
    assert dynamoe.fluctuation([jumping]) == pytest.approx(0.25, abs=0.02)
