"""Recovery: closer to the source on text it was not trained on, and everything else byte for byte as it was."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training import EXPERTS, SIZES, rows, strong
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.checkpoint import Checkpoint
from moekit.compress import sequence
from moekit.errors import OptionError, OutputError, TextError
from moekit.formats import NestedBank
from moekit.kernels.rewrites import AuxiliaryVectors, BitWidths
from moekit.plan import LayerPlan, Plan, make_plan, reload_check
from moekit.plan.layer import StoredExpert
from moekit.plan.values import keep, keep_rewrite
from moekit.train import TrainOptions, recover

OPTIONS = TrainOptions(steps=6, learning_rate=1e-2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eight experts, two layers."""
    folder = tmp_path_factory.mktemp("recover") / "source"
    torch.manual_seed(0)
    model = strong(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | EXPERTS | {"num_experts": 8})))
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """Compressed forms of it: pruned stock files, 2-bit packed, shared experts, masked rows."""
    import importlib

    engine = importlib.import_module("moekit.plan.apply")
    keep, engine.reload_in_fresh_process = engine.reload_in_fresh_process, lambda folder, **_: {"how": "not loaded"}
    folder = tmp_path_factory.mktemp("made")
    experts = [StoredExpert(((e, 1.0),)) for e in range(4)]
    plans = {
        "pruned": (make_plan(sequence(["random:keep=0.5"]), source, None), "stock"),
        "packed": (make_plan(sequence(["rtn:bits=2,group_size=8"]), source, None), "moekit"),
        "shared": (_plan(source, experts, [0, 1, 2, 3, 3, 2, 1, 0]), "moekit"),
        "masked": (_plan(source, experts, [0, 1, 2, 3, -1, -1, -1, -1]), "moekit"),
        "vectors": (_rewritten(source, experts, [0, 1, 2, 3, 3, 2, 1, 0], AuxiliaryVectors), "moekit"),
        "widths": (_nested(source), "moekit"),
    }
    for name, (plan, form) in plans.items():
        engine.apply(source, plan, folder / name, format=form)
    engine.reload_in_fresh_process = keep
    return folder


def _plan(source, experts, slots):
    layers = {layer.name: LayerPlan.aliased(experts, slots) for layer in source.moe_layers}
    return Plan(source=source.fingerprint, layers=layers)


def _rewritten(source, experts, slots, make):
    plan, size = _plan(source, experts, slots), source.moe_layers[0].shape.hidden_size
    head = make(torch.ones(len(slots), size), 1)
    kept = keep_rewrite(head.describe(), head.state_dict())
    return replace(plan, layers={name: replace(layer, rewrite=kept) for name, layer in plan.layers.items()})


def _nested(source):
    """Experts in planes, of which a head per expert reads two or three."""
    layers = {}
    for site in source.moe_layers:
        head = BitWidths((2, 3), torch.zeros(8, 2, site.shape.hidden_size), torch.zeros(8, 2))
        bank = NestedBank.quantise(source.bank(site.name), bits=3, base_bits=2, group_size=8)
        plan = LayerPlan.identity(8).valued(keep(bank))
        layers[site.name] = replace(plan, rewrite=keep_rewrite(head.describe(), head.state_dict()))
    return Plan(source=source.fingerprint, layers=layers)


def tensors(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.stack(rows(2)), use_cache=False).logits


def check(folder):
    """That it loads, as the command line has a process of its own do."""
    found = reload_check.check(str(folder))
    assert found["finite"]
    assert not found["missing_keys"] + found["unexpected_keys"] + found["mismatched_keys"]
    return found


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pruned", ("router", "norms")),
        ("pruned", ("scales",)),
        ("packed", ("router", "norms")),
        ("shared", ("experts",)),
    ],
)
def test_what_is_written_is_what_was_trained(source, made, tmp_path, name, what):
    done = recover(made / name, source, rows(4) * 4, tmp_path / "out", what=what, options=OPTIONS, check=check)
    assert done.after["kl"] < done.before["kl"]
    assert done.before["tokens"] == 2 * 9
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(stock), logits(done.model), atol=1e-5)
    report = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert report["trained"] == list(what)
    assert report["steps"] == 6
    assert report["reload"]["finite"]


def test_packed_experts_stay_as_they_lie(source, made, tmp_path):
    recover(made / "packed", source, rows(16), tmp_path / "out", options=OPTIONS)
    before, after = (tensors(folder) for folder in (made / "packed", tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("mlp.gate.weight")}


def test_experts_that_share_stay_shared(source, made):
    done = recover(made / "shared", source, rows(16), what=("experts",), options=OPTIONS)
    experts = done.model.model.layers[0].mlp.experts
    for one, other in itertools.pairwise([0, 7]):
        assert torch.equal(experts.down_proj[one], experts.down_proj[other])
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


def test_vectors_are_trained_and_written(source, made, tmp_path):
    done = recover(
        made / "vectors", source, rows(16), tmp_path / "out", what=("rewrite",), options=OPTIONS, check=check
    )
    assert done.after["kl"] < done.before["kl"]
    before, after = (tensors(folder) for folder in (made / "vectors", tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".experts.rewrite.theta")}
    assert len(changed) == len(source.moe_layers)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(done.model), atol=1e-5)


def test_vectors_are_trained_with_the_experts_and_the_format_keeps_them(source, made, tmp_path):
    what = ("rewrite", "experts", "router")
    done = recover(made / "vectors", source, rows(16), tmp_path / "out", what=what, options=OPTIONS, check=check)
    alone = recover(made / "vectors", source, rows(16), what=("rewrite",), options=OPTIONS)
    assert done.after["kl"] < alone.after["kl"] < done.before["kl"]
    again = Checkpoint.open(tmp_path / "out")
    layers = again.scheme.config["layers"]
    assert {(layer["experts"], layer["bits"], layer["rewrite"]["kind"]) for layer in layers.values()} == {
        (4, 16, "auxiliary-vectors")
    }
    before, after = (tensors(folder) for folder in (made / "vectors", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) != (".mlp." in name) for name in before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(done.model), atol=1e-5)


def test_what_is_around_learns_and_vectors_stay(source, made, tmp_path):
    done = recover(made / "vectors", source, rows(16), tmp_path / "out", what=("norms",), options=OPTIONS)
    before, after = (tensors(folder) for folder in (made / "vectors", tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "norm" in name}
    assert done.after["kl"] < done.before["kl"]


def test_masked_rows_stay_masked(source, made, tmp_path):
    done = recover(made / "masked", source, rows(16), tmp_path / "out", options=OPTIONS)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(stock), logits(done.model), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "error", "message"),
    [
        ("pruned", {"what": ("heads",)}, OptionError, "cannot train heads: choose of router, norms"),
        ("pruned", {"what": ()}, OptionError, "cannot train nothing"),
        ("pruned", {"what": ("scales", "experts")}, OptionError, "choose scales or experts"),
        ("masked", {"what": ("experts",)}, OptionError, "router rows without an expert"),
        ("pruned", {"what": ("rewrite",)}, OptionError, "has nothing at run time that recovery can train"),
        ("packed", {"what": ("rewrite",)}, OptionError, "such as compressed-experts"),
        ("widths", {}, OptionError, r"among several forms of each expert \(bit-widths\), which training cannot pass"),
        ("widths", {"what": ("rewrite",)}, OptionError, "has nothing at run time that recovery can train"),
        ("pruned", {"rows": rows(1)}, TextError, "1 row of text is too little"),
    ],
)
def test_what_cannot_be_recovered(source, made, name, more, error, message):
    given = {"rows": rows(16), "options": TrainOptions(steps=1), **more}
    with pytest.raises(error, match=message):
        recover(made / name, source, given.pop("rows"), **given)


def test_training_wants_one_device(source, made, monkeypatch):
    given = {"what": ("router",), "options": TrainOptions(steps=1)}
    with pytest.raises(OptionError, match="unknown device 'tpu': use auto, cpu or cuda"):
        recover(made / "pruned", source, rows(16), device="tpu", **given)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(OptionError, match="training runs on one device, and 2 GPUs are visible: set CUDA_VISIBLE_DEV"):
        recover(made / "pruned", source, rows(16), **given)
    assert recover(made / "pruned", source, rows(16), device="cpu", **given).model.device.type == "cpu"


def test_models_that_do_not_belong_together(source, made, tmp_path):
    other = tmp_path / "other"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | EXPERTS | {"vocab_size": 48})).save_pretrained(other)
    with pytest.raises(OptionError, match="have different vocabularies"):
        recover(made / "pruned", other, rows(16))
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        recover(made / "pruned", source, rows(16), made / "packed", options=TrainOptions(steps=1))
