"""The efficiency report: formulas by hand, parameters of known models, and no figure without a counter."""

import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.errors import OptionError
from moekit.measure import efficientllm
from moekit.measure.efficientllm import NOT_MEASURED, efficiency_report, mcr, parameters, tensor_bytes

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WORK = [{"input_ids": torch.ones(2, 5, dtype=torch.int64)}] * 3


def sparse():
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=4)
    ).eval()


def test_mcr_is_the_formula():
    assert mcr(100, 0.8, 25, 0.6) == pytest.approx(4 * 0.75)
    assert mcr(100, 0.8, 100, 0.8) == 1
    assert mcr(100, 0.8, 25, 0.4) == 2  # a quarter of the size at half the performance: above 1, and not good
    with pytest.raises(OptionError, match="must be positive"):
        mcr(100, 0, 25, 1)


def test_idle_experts_are_not_active():
    dense, model = Qwen3ForCausalLM(Qwen3Config(**SIZES)), sparse()
    count = sum(p.numel() for p in dense.parameters())
    assert parameters(dense) == (count, count)
    total, active = parameters(model)
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == 2 * 6 * (3 * 4 * 16)  # layers, idle experts, weights of one
    assert tensor_bytes(model) >= 4 * total


def test_the_report_says_what_it_did_not_measure(monkeypatch):
    monkeypatch.setattr(efficientllm, "_joules", dict)
    model = sparse()
    found = efficiency_report(model, WORK, rounds=2, reference=(2.0 * tensor_bytes(model), 1.0, 0.5)).as_dict()
    assert found["PCU"] == found["AEC_watts"] == NOT_MEASURED
    assert found["MCR"] == pytest.approx(1.0)
    assert found["AL_seconds"]["low"] <= found["AL_seconds"]["mean"] <= found["AL_seconds"]["high"]
    assert found["IT_tokens_per_second"] == pytest.approx(10 / found["AL_seconds"]["mean"])
    assert found["AMU_bytes"] > found["tensor_bytes"]
    json.dumps(found)
    assert efficiency_report(model, WORK).as_dict()["MCR"] == NOT_MEASURED
    with pytest.raises(OptionError, match="nothing to run"):
        efficiency_report(model, [])


def test_power_is_energy_over_time_where_a_counter_exists(tmp_path, monkeypatch):
    assert efficientllm._joules(str(tmp_path)) == {}
    for name, energy in (("intel-rapl:0", "3000000"), ("intel-rapl:0:0", "9"), ("intel-rapl:1", "broken")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(energy)
    assert efficientllm._joules(str(tmp_path)) == {"intel-rapl:0": 3.0}
    readings, clock = iter([{"a": 1.0}, {"a": 7.0}]), iter([0.0, 2.0])
    monkeypatch.setattr(efficientllm, "_joules", lambda: next(readings))
    monkeypatch.setattr(efficientllm.time, "perf_counter", lambda: next(clock))
    with efficientllm._Meter() as meter:
        pass
    assert meter.watts == 3.0
    readings = iter([{"a": 7.0}, {"a": 1.0}])  # a counter that wrapped
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(efficientllm, "_joules", lambda: next(readings))
    with efficientllm._Meter() as meter:
        pass
    assert meter.watts is None
