"""apply: what the plan says is what stock transformers loads, in every format, and what cannot be said is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from applying import alias, contents, expected_logits, keep, logits, merge, mixed, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import families
from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError, CheckpointError, OptionError, OutputError, PlanError
from moekit.plan.apply import apply
from moekit.plan.document import Plan
from moekit.plan.finite import finite
from moekit.plan.layer import LayerPlan
from moekit.plan.receipt import Receipt

pytestmark = pytest.mark.usefixtures("quick_reload")

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "dbrx", "nemotron_h")
PACKABLE = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


def source(folder: Path, family: str = "qwen3_moe", **overrides: object) -> Checkpoint:
    return Checkpoint.open(miniatures.plain(folder / "source", family, **overrides))


def load(folder: Path) -> object:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_output_computes_what_the_plan_says(tmp_path: Path, family: str) -> None:
    checkpoint = source(tmp_path, family)
    _, inputs = families.build(family)
    for name, make in (("keep", keep), ("merge", merge)):
        plan = plan_of(checkpoint, make)
        receipt = apply(checkpoint, plan, tmp_path / name)
        assert receipt.job["format"] == "stock"
        torch.testing.assert_close(
            logits(load(tmp_path / name), inputs), expected_logits(family, checkpoint, plan), atol=1e-5, rtol=1e-4
        )
        layer = Checkpoint.open(tmp_path / name).moe_layers[0]
        assert layer.num_experts == 6


@pytest.mark.parametrize("family", PACKABLE)
def test_moekit_output_computes_what_the_plan_says(tmp_path: Path, family: str) -> None:
    checkpoint = source(tmp_path, family)
    _, inputs = families.build(family)
    for name, make in (("alias", alias), ("mixed", mixed)):
        plan = plan_of(checkpoint, make)
        receipt = apply(checkpoint, plan, tmp_path / name)
        assert receipt.job["format"] == "moekit"
        assert receipt.reload["imports"] == ["moekit"]
        torch.testing.assert_close(
            logits(load(tmp_path / name), inputs), expected_logits(family, checkpoint, plan), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_output_equals_its_own_rounding(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoint = source(tmp_path)
    plan = plan_of(checkpoint, lambda layer: keep(layer).with_bits(bits, 16))
    receipt = apply(checkpoint, plan, tmp_path / "out", format="compressed-tensors")
    out = Checkpoint.open(tmp_path / "out")
    model, (_, inputs) = load(tmp_path / "out"), families.build("qwen3_moe")
    for layer in out.moe_layers:  # moekit's own decoder against the library's
        loaded = model.get_submodule(layer.name).experts
        bank = out.bank(layer.name, dtype=torch.float32)
        torch.testing.assert_close(loaded.gate_up_proj.float(), bank.gate_up, atol=0.02, rtol=0.02)
        source_bank = checkpoint.bank(layer.name).select([e for e in range(8) if e % 4 != 1])
        error = (bank.down - source_bank.down).abs().max() / source_bank.down.abs().max()
        assert float(error) < (0.1 if bits == 4 else 0.01)
    assert torch.isfinite(logits(model, inputs)).all()
    assert receipt.loadable["vllm"]["ok"]
    assert receipt.loadable["vllm"]["notes"][-1] == "tensor parallelism over 1 ranks keeps whole groups of 16"


@pytest.mark.parametrize("layout", ["fp8", "mxfp4"])
def test_quantised_sources(tmp_path: Path, layout: str) -> None:
    """Dropping experts copies the source's layout byte for byte; merging decodes all of it."""
    miniatures.write(layout, tmp_path / "source", tmp_path / "twin")
    checkpoint, twin = Checkpoint.open(tmp_path / "source"), Checkpoint.open(tmp_path / "twin")
    apply(checkpoint, plan_of(checkpoint, keep), tmp_path / "kept")
    out = Checkpoint.open(tmp_path / "kept")
    assert out.config["quantization_config"] == checkpoint.config["quantization_config"]
    apply(checkpoint, plan_of(checkpoint, merge), tmp_path / "merged")
    dense = Checkpoint.open(tmp_path / "merged")
    apply(twin, plan_of(twin, merge), tmp_path / "twin-merged")
    reference = Checkpoint.open(tmp_path / "twin-merged")
    assert "quantization_config" not in dense.config
    for layer in out.moe_layers:
        if layer.extra:
            continue
        chosen = [e for e in range(checkpoint.layer(layer.name).num_experts) if e % 4 != 1]
        for name, tensor in out.bank(layer.name).tensors().items():
            assert torch.equal(tensor, checkpoint.bank(layer.name, chosen).tensors()[name])
    common = reference.tensors.keys()
    assert dense.tensors.keys() == common
    assert all(torch.equal(dense.read(name), reference.read(name)) for name in common)


def test_prediction_layers_are_kept_or_named(tmp_path: Path) -> None:
    """They stay while counts stay; once counts change they are dropped, with their config, and the receipt says so."""
    miniatures.write("fp8", tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    extra = [layer.name for layer in checkpoint.moe_layers if layer.extra]
    assert extra
    same = apply(
        checkpoint, plan_of(checkpoint, lambda layer: LayerPlan.identity(layer.num_experts)), tmp_path / "same"
    )
    assert not same.dropped
    assert contents(tmp_path / "same")["config.json"] == json.dumps(checkpoint.config, indent=2).encode() + b"\n"
    fewer = apply(checkpoint, plan_of(checkpoint, keep), tmp_path / "fewer")
    assert list(fewer.dropped) == extra
    out = Checkpoint.open(tmp_path / "fewer")
    assert out.config["num_nextn_predict_layers"] == 0
    assert not [layer for layer in out.moe_layers if layer.extra]
    gone = [name for name, fate in fewer.tensors.items() if fate["became"] == "dropped" and "prediction" in fate["why"]]
    assert gone
    assert not set(gone) & out.tensors.keys()


def test_shared_and_uneven_layers_in_stock_format_on_request(tmp_path: Path) -> None:
    checkpoint = source(tmp_path, "deepseek_v3", n_group=1, topk_group=1)
    _, inputs = families.build("deepseek_v3", n_group=1, topk_group=1)
    uneven = plan_of(checkpoint, lambda layer: keep(layer) if layer.layer % 2 else LayerPlan.identity(8))
    for name, plan in (("alias", plan_of(checkpoint, alias)), ("uneven", uneven)):
        receipt = apply(checkpoint, plan, tmp_path / name, format="stock", materialise=True)
        assert receipt.reload["imports"] == []
        expected = expected_logits("deepseek_v3", checkpoint, plan, n_group=1, topk_group=1)
        torch.testing.assert_close(logits(load(tmp_path / name), inputs), expected, atol=1e-5, rtol=1e-4)


def test_ids_in_a_table_follow_their_rows(tmp_path: Path) -> None:
    """A hash-routed layer (token id -> expert ids) is exact as long as every expert it names lives on."""
    checkpoint = source(tmp_path, "deepseek_v4")
    table = next(name for name in checkpoint.tensors if name.endswith("tid2eid"))
    hashed = next(
        layer for layer in checkpoint.moe_layers if any(r.name.rpartition(".")[0] in table for r in layer.row_tensors)
    )
    used = checkpoint.read(table).unique().tolist()
    spare = [e for e in range(8) if e not in used]
    with pytest.raises(PlanError, match=rf"tid2eid sends tokens to expert {used[0]} by their id, and the plan drops"):
        apply(
            checkpoint,
            plan_of(checkpoint, lambda layer: LayerPlan.keep([e for e in range(8) if e != used[0]], 8)),
            tmp_path / "no",
        )
    if spare:
        plan = plan_of(checkpoint, lambda layer: LayerPlan.keep([e for e in range(8) if e != spare[0]], 8))
        apply(checkpoint, plan, tmp_path / "out")
        moved = Checkpoint.open(tmp_path / "out").read(table)
        rows = [e for e in range(8) if e != spare[0]]
        assert torch.equal(torch.tensor(rows)[moved.long()], checkpoint.read(table).long())
        assert hashed.name in plan.layers


REFUSED = {
    "stock bits": (
        "stock",
        lambda layer: keep(layer).with_bits(8),
        r"stock format keeps the source's precision.*8 bits",
    ),
    "stock alias": ("stock", alias, r"router rows that share an expert or are masked.*use --format moekit"),
    "stock uneven": (
        "stock",
        lambda layer: keep(layer) if layer.layer else LayerPlan.identity(8),
        r"between 6 and 8 experts, but",
    ),
    "export mixed": (
        "compressed-tensors",
        mixed,
        r"every expert at 4 or every expert at 8 bits.*decode mixed widths wr",
    ),
    "export none": ("compressed-tensors", keep, r"the plan has 16 bits"),
    "export group": (
        "compressed-tensors",
        lambda layer: keep(layer).with_bits(4, 24),
        r"not a multiple of group_size 24",
    ),
    "unknown": ("gguf", keep, r"unknown format 'gguf': use one of auto, stock, moekit, compressed-tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_say_is_refused_before_any_work(tmp_path: Path, case: str) -> None:
    format, make, message = REFUSED[case]
    checkpoint = source(tmp_path)
    plan = plan_of(checkpoint, make)
    with pytest.raises((PlanError, OptionError), match=message):
        apply(checkpoint, plan, tmp_path / "out", format=format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_families_that_the_export_is_not_read_for(tmp_path: Path) -> None:
    for family, why in (("gpt_oss", "has expert biases"), ("granitemoe", "stacks all experts in one tensor")):
        checkpoint = source(tmp_path / family, family)
        plan = plan_of(checkpoint, lambda layer: keep(layer).with_bits(4, 16))
        with pytest.raises(PlanError, match=why):
            apply(checkpoint, plan, tmp_path / "out", format="compressed-tensors")


def test_padding_needs_a_bias_and_no_groups(tmp_path: Path) -> None:
    for family, why in (("qwen3_moe", "no selection bias"), ("deepseek_v3", "ranks experts in groups")):
        checkpoint = source(tmp_path / family, family)
        first = checkpoint.moe_layers[0].name
        plan = plan_of(
            checkpoint, lambda layer, first=first: keep(layer) if layer.name == first else LayerPlan.identity(8)
        )
        with pytest.raises(PlanError, match=why):
            apply(checkpoint, plan, tmp_path / "out", format="stock", materialise=True)


def test_a_plan_for_another_model_and_damaged_weights(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    with pytest.raises(PlanError, match="another model"):
        apply(checkpoint, Plan(source="0" * 64, layers={}), tmp_path / "out")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    file = tmp_path / "source" / "model.safetensors"
    info, data = checkpoint.tensors[name], bytearray(file.read_bytes())
    data[info.offset : info.offset + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(data)
    for make in (keep, merge):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds NaN values: the weights are damaged"):
            apply(checkpoint, plan_of(checkpoint, make), tmp_path / make.__name__)
    assert not (tmp_path / "keep").exists()


def test_a_cap_below_the_need_names_one_that_works(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    plan = plan_of(checkpoint, keep)
    with pytest.raises(BudgetError, match="the smallest cap that works is") as refusal:
        apply(checkpoint, plan, tmp_path / "out", max_ram="100MB")
    assert not list(tmp_path.glob("*out*"))
    smallest = re.search(r"works is (\S+)", str(refusal.value))[1]
    receipt = apply(checkpoint, plan, tmp_path / "out", max_ram=smallest)
    assert receipt.run["max_ram_bytes"] >= receipt.run["peak_memory_bytes"]


def test_where_a_whole_load_does_not_fit_names_and_shapes_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["moekit.plan.apply"], "_PYTHON_BYTES", 10**15)
    checkpoint = source(tmp_path)
    for make in (keep, mixed):
        receipt = apply(checkpoint, plan_of(checkpoint, make), tmp_path / make.__name__)
        assert receipt.reload["how"].startswith("dry run")
        assert receipt.reload["missing_keys"] == receipt.reload["unexpected_keys"] == []


def test_an_output_that_does_not_load_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path, *, with_moekit: bool, excused: object = ()) -> dict[str, object]:
        raise OutputError(f"{folder} is not published: stock transformers loads it with missing key x")

    checkpoint = source(tmp_path)
    plan = plan_of(checkpoint, keep)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["moekit.plan.apply"], "reload_in_fresh_process", broken)
        with pytest.raises(OutputError, match="is not published"):
            apply(checkpoint, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "model-00001-of-00004.safetensors").exists()
    assert apply(checkpoint, plan, tmp_path / "out").run["resumed"] == [
        "rest",
        *(f"model.layers.{i}" for i in range(3)),
    ]


def test_progress_covers_the_held_out_passes(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    told: list[tuple[str, int, int]] = []
    apply(
        checkpoint, plan_of(checkpoint, keep), tmp_path / "out", text=["some words"], progress=lambda *s: told.append(s)
    )
    parts = list(dict.fromkeys(what for what, _, _ in told))
    assert parts == ["measuring the source", "writing", "measuring the output"]
    for part in parts:
        last = [step for step in told if step[0] == part][-1]
        assert last[1] == last[2] > 0


def test_text_is_measured_by_domain_or_token_ids(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    plan = plan_of(checkpoint, keep)
    text = {"prose": ["the quick brown fox"], "code": ["def f(x): return x"]}
    receipt = apply(checkpoint, plan, tmp_path / "out", text=text)
    found = receipt.divergence
    assert found is not None
    assert found["kl"] > 0
    assert 0 < found["bits_per_byte_source"] < 20
    assert set(found["domains"]) == {"prose", "code"}
    assert sum(one["tokens"] for one in found["domains"].values()) == found["tokens"]
    assert found["domains"]["code"]["kl_low"] <= found["domains"]["code"]["kl"] <= found["domains"]["code"]["kl_high"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| code | {found['domains']['code']['tokens']} | {found['domains']['code']['kl']:.5f} [" in card
    ids = [checkpoint.tokenizer()("the quick brown fox")["input_ids"]]
    again = apply(checkpoint, plan, tmp_path / "ids", text=ids).divergence
    assert again["tokens"] == len(ids[0]) - 1
    assert "domains" not in again
    unchanged = apply(
        checkpoint, plan_of(checkpoint, lambda layer: LayerPlan.identity(8)), tmp_path / "same", text=text
    )
    assert unchanged.divergence["kl"] == 0
    assert unchanged.divergence["agreement"] == 1
    assert Receipt.load(tmp_path / "out") == receipt


@settings(max_examples=40)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64]),
    size=st.integers(0, 50),
    place=st.integers(0, 49),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_every_value_that_is_not_finite_is_seen(dtype: torch.dtype, size: int, place: int, bad: float) -> None:
    tensor = torch.linspace(-3, 3, size).to(dtype)
    assert finite(tensor, "w") is tensor
    if place < size and not (dtype is torch.float8_e4m3fn and bad == bad):  # float8 has no infinity, only NaN
        tensor[place] = bad
        with pytest.raises(CheckpointError, match=r"^w holds (NaN|infinite) values: the weights are damaged"):
            finite(tensor, "w")
