"""The receipt: every tensor and every expert of the source has a fate, and the figures are those of the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from applying import alias, keep, merge, mixed, plan_of

from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.shards import sha256
from moekit.errors import OutputError
from moekit.plan.apply import apply
from moekit.plan.engines import expectations
from moekit.plan.loadable import dry_load, problems
from moekit.plan.produce import produce
from moekit.plan.receipt import Receipt, layer_account
from moekit.plan.reload import reload_problem
from moekit.plan.target import make_target

pytestmark = pytest.mark.usefixtures("quick_reload")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(miniatures.plain(tmp_path_factory.mktemp("receipt") / "source"))


def test_every_tensor_and_expert_is_accounted_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for make in (keep, merge, mixed, alias):
        apply(checkpoint, plan_of(checkpoint, make), tmp_path / make.__name__, text=["some words to measure"])
        receipt, out = Receipt.load(tmp_path / make.__name__), Checkpoint.open(tmp_path / make.__name__)
        assert receipt.tensors.keys() == checkpoint.tensors.keys()
        for layer in checkpoint.moe_layers:
            told = receipt.layers[layer.name]
            assert [entry["expert"] for entry in told["experts"]] == list(range(8))
            assert sum(told["summary"].values()) == 8
        assert receipt.output.keys() == out.tensors.keys()
        for name, entry in receipt.output.items():
            info = out.tensors[name]
            assert (entry["nbytes"], tuple(entry["shape"])) == (info.nbytes, info.shape)
            assert entry["sha256"] == sha256(out.read(name))
        assert receipt.nbytes["before"] == sum(info.nbytes for info in checkpoint.tensors.values())
        assert receipt.nbytes["after"] == sum(info.nbytes for info in out.tensors.values())
        assert receipt.nbytes["experts_after"] < receipt.nbytes["experts_before"]
        assert receipt.run["peak_memory_bytes"] > 50_000_000
        assert {"moekit", "torch", "transformers", "safetensors", "python"} <= receipt.versions.keys()


def test_the_words(checkpoint: Checkpoint) -> None:
    """kept, merged, quantised, dropped, and masked where an expert is stored but no row may call it."""
    layer = checkpoint.moe_layers[0]

    def words(make: object) -> dict[int, str]:
        target = make_target(checkpoint, plan_of(checkpoint, make)).layers[layer.name]  # type: ignore[arg-type]
        return {entry["expert"]: entry["became"] for entry in layer_account(target, "")["experts"]}

    assert words(keep) == {**dict.fromkeys(range(8), "kept"), 1: "dropped", 5: "dropped"}
    assert words(merge) == {**dict.fromkeys(range(8), "kept"), 0: "merged", 1: "merged", 5: "dropped"}
    assert set(words(alias).values()) == {"merged"}
    assert words(mixed)[0] == "quantised"
    assert words(mixed)[3] == "kept"  # the third of (8, 4, 16) bits


def test_source_headers_are_hashed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    receipt = apply(checkpoint, plan_of(checkpoint, keep), tmp_path / "out")
    (digest,) = receipt.source["headers"].values()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert receipt.source["fingerprint"] == checkpoint.fingerprint


def test_what_is_no_receipt(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot read the receipt .*: No such file"):
        Receipt.load(tmp_path)
    for text in ("{", "[]", '{"format": "other"}', '{"format": "moekit-receipt", "version": 9}'):
        (tmp_path / "receipt.json").write_text(text)
        with pytest.raises(OutputError, match=r"is no receipt of version 1 written by moekit"):
            Receipt.load(tmp_path)


def test_the_model_card_says_what_the_receipt_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    receipt = apply(checkpoint, plan_of(checkpoint, mixed), tmp_path / "small", text=["some words to measure"])
    card = (tmp_path / "small" / "README.md").read_text()
    front = card.split("---")[1]
    assert 'base_model: "source"' in front
    assert "- qwen3_moe" in front
    assert "# small" in card
    assert "`by-hand`" in card
    assert "import moekit" in card
    assert f"KL divergence {receipt.divergence['kl']:.5f}" in card
    assert "| model.layers.0.mlp | 8 | 6 | 8 |" in card
    assert "vLLM: not loadable" in card
    apply(checkpoint, plan_of(checkpoint, keep), tmp_path / "stock")
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "Not measured: no held-out text was given." in card
    assert "import moekit" not in card
    assert "vLLM: as expected" in card


def test_engines_find_wrong_numbers_and_missing_files(checkpoint: Checkpoint) -> None:
    from dataclasses import replace

    production = produce(checkpoint, plan_of(checkpoint, keep))
    assert expectations(production, ["tokenizer.json"])["gguf"]["ok"]
    assert expectations(production, [])["gguf"]["against"] == ["no tokenizer lies beside the weights"]
    gone = "model.layers.0.mlp.experts.2.up_proj.weight"
    unit = production.units[1]
    short = replace(unit, tensors={name: lazy for name, lazy in unit.tensors.items() if name != gone})
    broken = replace(production, units=(production.units[0], short, *production.units[2:]))
    found = expectations(broken, ["tokenizer.json"])
    assert found["vllm"]["against"] == [
        "model.layers.0.mlp.experts.*.up_proj.weight: 5 experts where the config states 6"
    ]
    assert not found["gguf"]["ok"]
    assert found["vllm"]["notes"] == ["expert parallelism over 2 ranks"]


def test_a_dry_load_finds_what_a_real_one_would(checkpoint: Checkpoint) -> None:
    specs = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    assert problems(dry_load(checkpoint.path, specs)) == []
    norm = "model.norm.weight"
    without = {name: spec for name, spec in specs.items() if name != norm}
    assert problems(dry_load(checkpoint.path, without)) == [f"missing key {norm}"]
    assert problems(dry_load(checkpoint.path, specs | {"odd": specs[norm]})) == ["unexpected key odd"]
    wrong = dry_load(checkpoint.path, specs | {norm: (specs[norm][0], (7,))})
    assert any(norm in line and line.startswith("mismatched key") for line in problems(wrong))


def test_what_a_reload_may_report() -> None:
    fine = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "finite": True}
    assert reload_problem(fine) is None
    assert reload_problem({"error": "ValueError: x"}) == "cannot load it: ValueError: x"
    assert reload_problem(fine | {"missing_keys": ["a", "b"]}) == "loads it with missing key a and 1 more"
    assert reload_problem(fine | {"finite": False}) == "computes logits that are not finite from it"


def test_the_receipt_is_json_that_people_can_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    apply(checkpoint, plan_of(checkpoint, keep), tmp_path / "out")
    text = (tmp_path / "out" / "receipt.json").read_text()
    assert json.loads(text)["format"] == "moekit-receipt"
    assert max(map(len, text.splitlines())) < 1000


def test_recovery_is_offered_and_not_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    apply(checkpoint, plan_of(checkpoint, keep), tmp_path / "out", text=["some words to measure"])
    receipt = Receipt.load(tmp_path / "out")
    assert "without training afterwards: moekit recover OUTPUT --against source --text" in receipt.recovery
    assert receipt.recovery in (tmp_path / "out" / "README.md").read_text()
    old = json.loads(receipt.to_json())
    del old["recovery"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Receipt.load(tmp_path / "old.json").recovery == ""
    del old["divergence"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(OutputError, match="is no receipt of version 1"):
        Receipt.load(tmp_path / "old.json")
