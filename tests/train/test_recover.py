"""Recovery: closer to the source on text it was not trained on, and everything else byte for byte as it was."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from training import EXPERTS, SIZES, rows, strong
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.checkpoint import Checkpoint
from moekit.compress import sequence
from moekit.errors import OptionError, OutputError, TextError
from moekit.plan import LayerPlan, Plan, make_plan, reload_check
from moekit.plan.layer import StoredExpert
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
    }
    for name, (plan, form) in plans.items():
        engine.apply(source, plan, folder / name, format=form)
    engine.reload_in_fresh_process = keep
    return folder


def _plan(source, experts, slots):
    layers = {layer.name: LayerPlan.aliased(experts, slots) for layer in source.moe_layers}
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
        ("pruned", {"rows": rows(1)}, TextError, "1 row of text is too little"),
    ],
)
def test_what_cannot_be_recovered(source, made, name, more, error, message):
    given = {"rows": rows(16), "options": TrainOptions(steps=1), **more}
    with pytest.raises(error, match=message):
        recover(made / name, source, given.pop("rows"), **given)


def test_models_that_do_not_belong_together(source, made, tmp_path):
    other = tmp_path / "other"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | EXPERTS | {"vocab_size": 48})).save_pretrained(other)
    with pytest.raises(OptionError, match="have different vocabularies"):
        recover(made / "pruned", other, rows(16))
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        recover(made / "pruned", source, rows(16), made / "packed", options=TrainOptions(steps=1))
