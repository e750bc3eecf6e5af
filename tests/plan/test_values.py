"""Computed values: kept beside the plan, written in every format that can hold them, verified with and without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from applying import kept, logits, plan_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
import moekit
from checkpoint import miniatures
from moekit.bank import ExpertWeights
from moekit.checkpoint import Checkpoint, MoELayer
from moekit.contract import Context, RouterEdit, Routing
from moekit.errors import PlanError
from moekit.formats import DenseBank, PackedBank
from moekit.kernels.rewrites import TopSlots
from moekit.measure import compare
from moekit.plan import LayerPlan, LayerPlanner, LiveLoss, Plan, Site, StoredExpert, apply, make_plan, values, verify
from moekit.plan.recombine import recombined
from moekit.stream import LoadedModel

pytestmark = pytest.mark.usefixtures("quick_reload")


def source(folder: Path, family: str = "qwen3_moe") -> Checkpoint:
    return Checkpoint.open(miniatures.plain(folder / "source", family))


def computed(checkpoint: Checkpoint, *, packed: bool, edits: dict[str, torch.Tensor] | None = None) -> Plan:
    """Three quarters of the experts, each a tenth larger than it was, as plain weights or as 4-bit integers."""

    def layer_of(layer: MoELayer) -> LayerPlan:
        bank = checkpoint.bank(layer.name, kept(layer))
        grown = DenseBank.stack(
            [ExpertWeights(w.gate_up, w.down * 1.1, w.gate_up_bias, w.down_bias) for w in map(bank.expert, range(6))],
            bank.activation,
        )
        made = values.keep(PackedBank.quantise(grown, 4, 16) if packed else grown, edits)
        return LayerPlan.keep(kept(layer), layer.num_experts).valued(made, "grown")

    return plan_of(checkpoint, layer_of)


def _first_only(routing: Routing, _: Context) -> Routing:
    """All weight on the heaviest slot."""
    weight = routing.weight
    first = torch.nn.functional.one_hot(weight.argmax(1), weight.shape[1]).to(weight.dtype)
    return replace(routing, weight=first * weight.sum(1, keepdim=True))


def expected(checkpoint: Checkpoint, plan: Plan) -> torch.Tensor:
    model, inputs = families.build("qwen3_moe")
    for block in moekit.blocks(model):
        layer = plan.layers[block.name]
        bank = recombined(checkpoint.bank(block.name), layer)
        place = {row[0][0]: slot for row, slot in zip(layer.rows, layer.slots, strict=True)}
        block.put(DenseBank.stack([bank.expert(place.get(e, 0)) for e in range(block.num_experts)], bank.activation))
        block.mask(sorted(place)).attach()
    return logits(model, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_output_holds_the_values(tmp_path: Path, packed: bool) -> None:
    checkpoint = source(tmp_path)
    plan = computed(checkpoint, packed=packed)
    receipt = apply(checkpoint, plan, tmp_path / "out")
    assert receipt.job["format"] == ("moekit" if packed else "stock")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, inputs = families.build("qwen3_moe")
    torch.testing.assert_close(logits(model, inputs), expected(checkpoint, plan), atol=1e-5, rtol=1e-4)
    assert {t["became"] for n, t in receipt.tensors.items() if ".experts." in n} == {"computed", "dropped"}


def test_a_saved_plan_brings_its_values(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    plan = computed(checkpoint, packed=True)
    plan.save(tmp_path / "p.json")
    loaded = Plan.load(tmp_path / "p.json")
    assert loaded == plan
    assert loaded.fingerprint == plan.fingerprint
    apply(checkpoint, loaded, tmp_path / "out")
    shutil.rmtree(tmp_path / "p.values")
    with pytest.raises(PlanError, match=r"computed values are not beside it .*keep PLAN.json and PLAN.values together"):
        apply(checkpoint, Plan.load(tmp_path / "p.json"), tmp_path / "out2")


def test_changed_values_are_found(tmp_path: Path) -> None:
    plan = computed(source(tmp_path), packed=False)
    plan.save(tmp_path / "p.json")
    file = next((tmp_path / "p.values").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(PlanError, match="does not hold what the plan computed"):
        Plan.load(tmp_path / "p.json")


@pytest.mark.parametrize(("family", "packed"), [("qwen3_moe", True), ("qwen3_moe", False), ("gpt_oss", False)])
def test_verified_exactly_with_the_plan_and_by_likeness_without(tmp_path: Path, family: str, packed: bool) -> None:
    checkpoint = source(tmp_path, family)
    plan = computed(checkpoint, packed=packed)
    apply(checkpoint, plan, tmp_path / "out")
    exact = verify(tmp_path / "out", checkpoint, plan=plan)
    assert exact.ok
    assert exact.likened == ()
    likened = verify(tmp_path / "out", checkpoint)
    assert likened.problems == ()
    assert likened.bytes_compared < exact.bytes_compared
    assert any(".experts" in name for name in likened.likened)


@pytest.mark.parametrize("how", ["zeroed", "swapped", "exchanged"])
def test_likeness_finds_what_matters(tmp_path: Path, how: str) -> None:
    checkpoint = source(tmp_path)
    apply(checkpoint, computed(checkpoint, packed=False), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    if not file.exists():
        file = next((tmp_path / "out").glob("model-*2-of*.safetensors"))
    tensors = load_file(file)
    prefix = sorted(n for n in tensors if n.endswith("experts.2.gate_proj.weight"))[0].removesuffix(
        "2.gate_proj.weight"
    )
    two, three = (f"{prefix}{e}.{{}}_proj.weight" for e in (2, 3))
    for part in ("gate", "up", "down"):
        name, other = two.format(part), three.format(part)
        if how == "zeroed":
            tensors[name].zero_()
        elif how == "swapped":
            tensors[name], tensors[other] = tensors[other], tensors[name]
    if how == "exchanged":
        gate, up = two.format("gate"), two.format("up")
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, file, metadata={"format": "pt"})
    problems = verify(tmp_path / "out", checkpoint).problems
    assert any("stored expert 2 is no more like its source" in problem for problem in problems), problems


def test_edits_replace_tensors_around_the_experts(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    name = next(n for n in checkpoint.tensors if n.endswith("post_attention_layernorm.weight"))
    router = checkpoint.moe_layers[0].row_tensors[0].name
    edits = {name: checkpoint.read(name) * 2, router: checkpoint.read(router) + 1}
    first = checkpoint.moe_layers[0]
    layer = LayerPlan.identity(first.num_experts).valued(values.keep(checkpoint.bank(first.name), edits))
    plan = Plan(source=checkpoint.fingerprint, layers={first.name: layer})
    receipt = apply(checkpoint, plan, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert torch.equal(out.read(name), edits[name])
    assert torch.equal(out.read(router), edits[router])
    assert receipt.tensors[name]["became"] == "replaced"
    assert verify(tmp_path / "out", checkpoint, plan=plan).ok


def test_formats_that_cannot_hold_values_say_so(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    plan = computed(checkpoint, packed=True)
    with pytest.raises(
        PlanError, match=r"stores its experts as packed, which the stock format cannot say; use --format"
    ):
        apply(checkpoint, plan, tmp_path / "out", format="stock")
    apply(checkpoint, plan, tmp_path / "plain", format="stock", materialise=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    _, inputs = families.build("qwen3_moe")
    torch.testing.assert_close(logits(model, inputs), expected(checkpoint, plan), atol=1e-5, rtol=1e-4)


def test_what_may_follow(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    dense = computed(checkpoint, packed=False).layers["model.layers.1.mlp"]
    packed = computed(checkpoint, packed=True).layers["model.layers.1.mlp"]
    fewer = LayerPlan.keep([1, 3], 6)
    bank = checkpoint.bank("model.layers.1.mlp")
    for plan in (dense, packed):
        some = recombined(bank, plan.then(fewer))
        assert torch.equal(some.down, recombined(bank, plan).down[[1, 3]])
        assert plan.then(LayerPlan.identity(6)).values == plan.values
    assert dense.then(fewer.with_bits(8)).values is not None
    with pytest.raises(PlanError, match="experts stored as packed cannot be rounded to integers"):
        packed.then(fewer.with_bits(8))
    merged = LayerPlan.aliased([StoredExpert(((0, 0.5), (1, 0.5)))] * 1, [0] * 6)
    with pytest.raises(PlanError, match="cannot be merged any more"):
        dense.then(merged)


def test_nonsense_in_the_document(tmp_path: Path) -> None:
    plan = computed(source(tmp_path), packed=False)
    plan.save(tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())
    layer = next(iter(found["layers"].values()))
    for change, message in (
        ({"sha256": "x"}, "expected the SHA-256 of a file"),
        ({"chosen": [0]}, "values of 1 experts for 6 stored ones"),
        ({"chosn": [0]}, "did you mean 'chosen'"),
    ):
        layer_was = dict(layer["values"])
        layer["values"] |= change
        (tmp_path / "q.json").write_text(json.dumps(found))
        with pytest.raises(PlanError, match=message):
            Plan.load(tmp_path / "q.json")
        layer["values"] = layer_was


def test_a_spool_keeps_values_where_it_is_told(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    with values.spooling(tmp_path / "spool"):
        plan = computed(checkpoint, packed=True)
    assert {p.suffix for p in (tmp_path / "spool").iterdir()} == {".safetensors"}
    digests = {layer.values.digest for layer in plan.layers.values() if layer.values}
    assert digests == {p.stem for p in (tmp_path / "spool").iterdir()}


def test_a_packed_source_is_a_source(tmp_path: Path) -> None:
    miniatures.write("moekit", tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    fewer = plan_of(checkpoint, lambda layer: LayerPlan.keep(kept(layer), layer.num_experts))
    receipt = apply(checkpoint, fewer, tmp_path / "fewer")
    assert receipt.job["format"] == "moekit"
    before, after = (Checkpoint.open(tmp_path / n).stored_bank("model.layers.1.mlp") for n in ("source", "fewer"))
    for name, tensor in before.select(kept(checkpoint.moe_layers[0])).tensors().items():
        assert torch.equal(tensor, after.tensors()[name])
    assert verify(tmp_path / "fewer", checkpoint).ok
    plain = plan_of(checkpoint, lambda layer: LayerPlan.identity(layer.num_experts))
    apply(checkpoint, plain, tmp_path / "plain", format="stock")
    decoded = Checkpoint.open(tmp_path / "plain").bank("model.layers.1.mlp")
    for expert in range(before.num_experts):
        assert torch.equal(decoded.expert(expert).down, before.expert(expert).down.to(decoded.dtype))
    rounded = plan_of(checkpoint, lambda layer: LayerPlan.identity(layer.num_experts).with_bits(3, 16))
    apply(checkpoint, rounded, tmp_path / "rounded")
    assert set(Checkpoint.open(tmp_path / "rounded").stored_bank("model.layers.1.mlp").bits) == {3}


def test_a_packed_source_whose_rows_share_experts_is_refused(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    shared = plan_of(
        checkpoint, lambda layer: LayerPlan.aliased([StoredExpert(((0, 1.0),)), StoredExpert(((1, 1.0),))], [0, 1] * 4)
    )
    apply(checkpoint, shared, tmp_path / "shared")
    packed = Checkpoint.open(tmp_path / "shared")
    with pytest.raises(
        PlanError, match="router rows that share an expert or are masked: apply plans to the model it was"
    ):
        apply(packed, Plan(source=packed.fingerprint, layers={}), tmp_path / "out")


def test_a_rewrite_routes_wherever_the_output_is_loaded(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    rewrite = TopSlots(1)

    def first_only(layer: MoELayer) -> LayerPlan:
        plan = LayerPlan.identity(layer.num_experts)
        return replace(plan, rewrite=values.keep_rewrite(rewrite.describe(), rewrite.state_dict()))

    plan = plan_of(checkpoint, first_only)
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == plan
    with pytest.raises(
        PlanError, match=r"changes its routing at run time \(top-slots\), which the stock format cannot"
    ):
        apply(checkpoint, plan, tmp_path / "stock", format="stock")
    apply(checkpoint, plan, tmp_path / "out")
    assert verify(tmp_path / "out", checkpoint).ok
    model, inputs = families.build("qwen3_moe")
    for block in moekit.blocks(model):
        block.edit(RouterEdit(after_weigh=_first_only)).attach()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), inputs),
        logits(model, inputs),
        atol=1e-5,
        rtol=1e-4,
    )
    again = Checkpoint.open(tmp_path / "out")
    apply(again, Plan(source=again.fingerprint, layers={}), tmp_path / "copy")
    assert verify(tmp_path / "copy", again).ok
    routed = plan.layers["model.layers.1.mlp"]
    with pytest.raises(PlanError, match="put it last"):
        routed.then(LayerPlan.keep([0, 1, 2], 8))
    assert routed.then(LayerPlan.identity(8).with_bits(4)).rewrite == routed.rewrite


def test_a_rewrite_is_measured_live_as_it_will_run(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    rewrite = TopSlots(1)
    made = values.keep_rewrite(rewrite.describe(), rewrite.state_dict())
    plan = plan_of(checkpoint, lambda layer: replace(LayerPlan.keep(kept(layer), layer.num_experts), rewrite=made))
    rows = [np.arange(3, 40), np.arange(60, 20, -1)]
    loss = LiveLoss(LoadedModel.load(checkpoint, dtype=torch.float32), checkpoint, rows)
    measured = loss(plan)
    assert measured > loss(replace(plan, layers={n: replace(p, rewrite=None) for n, p in plan.layers.items()})) > 0
    assert loss(Plan(source=checkpoint.fingerprint, layers={})) == pytest.approx(0, abs=1e-9)
    apply(checkpoint, plan, tmp_path / "out")
    batches = [{"input_ids": torch.from_numpy(row.copy())[None]} for row in rows]
    both = [LoadedModel.load(c, dtype=torch.float32) for c in (checkpoint, Checkpoint.open(tmp_path / "out"))]
    assert measured == pytest.approx(compare(*both, batches).kl.mean, rel=1e-3)


@dataclass(frozen=True, kw_only=True)
class Doubling(LayerPlanner):
    """Every expert twice as large; fails at a layer, as an interrupted run would."""

    fail: str = ""
    calls: ClassVar[list[str]] = []

    @property
    def spec(self) -> str:
        return "doubling"

    def plan_layer(self, layer: object, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        self.calls.append(site.name)
        if site.name == self.fail:
            raise RuntimeError("the lights went out")
        dense = bank()
        made = values.keep(replace(dense, down=dense.down * 2))
        return LayerPlan.identity(site.num_experts).valued(made)


def test_interrupted_planning_goes_on_where_it_was(tmp_path: Path) -> None:
    checkpoint = source(tmp_path)
    names = [layer.name for layer in checkpoint.moe_layers]
    undisturbed = make_plan([Doubling()], checkpoint)
    with values.spooling(tmp_path / "spool"):
        with pytest.raises(RuntimeError, match="lights"):
            make_plan([Doubling(fail=names[-1])], checkpoint)
        Doubling.calls.clear()
        resumed = make_plan([Doubling()], checkpoint)
        assert Doubling.calls == names[-1:]
        assert resumed == undisturbed
        assert resumed.fingerprint == undisturbed.fingerprint
        after_another = make_plan([Doubling(), Doubling()], checkpoint)  # follows from another source: made anew
    assert after_another != undisturbed
    assert len(Doubling.calls) == 1 + len(names)


def test_several_processes_need_a_common_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match="needs a folder that all of them see"):
        make_plan([Doubling()], source(tmp_path))
