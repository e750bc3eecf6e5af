"""verify: every way to tamper with an output is found, whatever its receipt says."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from applying import contents, keep, merge, mixed, plan_of, reload_here
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.shards import sha256
from moekit.errors import BudgetError, CheckpointError, OutputError, VerificationError
from moekit.plan.apply import apply
from moekit.plan.verify import verify

pytestmark = pytest.mark.usefixtures("quick_reload")

Change = Callable[[dict[str, Tensor]], None]
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
PACKED = "model.layers.1.mlp.experts.{}.{}.qweight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and three outputs: pruned (stock), merged (stock), mixed bits and counts (moekit)."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint = Checkpoint.open(miniatures.plain(folder / "source"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["moekit.plan.apply"], "reload_in_fresh_process", reload_here)
        for make in (keep, merge, mixed):
            apply(checkpoint, plan_of(checkpoint, make), folder / make.__name__)
    return folder


def tampered(made: Path, tmp_path: Path, output: str, change: Change, *, forge: bool = True) -> tuple[str, ...]:
    """The problems found after ``change`` rewrote tensors of a copy, its receipt edited to match."""
    folder = tmp_path / output
    shutil.copytree(made / output, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    before = {name: load_file(folder / name) for name in sorted(set(index["weight_map"].values()))}
    every = {name: tensor for tensors in before.values() for name, tensor in tensors.items()}
    names = set(every)
    change(every)
    for file, tensors in before.items():
        save_file({n: every[n].contiguous() for n in tensors if n in every}, folder / file, metadata={"format": "pt"})
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in every}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names >= set(every)
    if forge:
        _forge(folder, every)
    report = verify(folder, made / "source")
    assert not report.ok
    with pytest.raises(VerificationError, match="is not what its source and plan produce"):
        report.require()
    return report.problems


def _forge(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Make the receipt tell the story of the tampered tensors."""
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["output"] = {n: e for n, e in receipt["output"].items() if n in tensors}
    for name, tensor in tensors.items():
        receipt["output"][name]["sha256"] = sha256(tensor)
    (folder / "receipt.json").write_text(json.dumps(receipt))


def zeroed(tensors: dict[str, Tensor]) -> None:
    for part in ("gate", "up", "down"):
        tensors[EXPERT.format(2, part)].zero_()


def swapped(tensors: dict[str, Tensor]) -> None:
    for part in ("gate", "up", "down"):
        one, two = EXPERT.format(0, part), EXPERT.format(3, part)
        tensors[one], tensors[two] = tensors[two], tensors[one]


def exchanged(tensors: dict[str, Tensor]) -> None:
    one, two = EXPERT.format(4, "gate"), EXPERT.format(4, "up")
    tensors[one], tensors[two] = tensors[two], tensors[one]


def permuted(tensors: dict[str, Tensor]) -> None:
    router = tensors["model.layers.2.mlp.gate.weight"]
    router[[0, 1]] = router[[1, 0]]


def dropped(tensors: dict[str, Tensor]) -> None:
    del tensors[EXPERT.format(5, "down")]


def one_bit(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1


def repacked(tensors: dict[str, Tensor]) -> None:
    tensors[PACKED.format(1, "down")][0, 0] ^= 16


CHANGES: dict[str, tuple[Change, str]] = {
    "an expert zeroed": (zeroed, r"experts\.2\.down_proj\.weight differs"),
    "two experts swapped": (swapped, r"experts\.0\.down_proj\.weight differs"),
    "gate and up exchanged": (exchanged, r"experts\.4\.gate_proj\.weight differs"),
    "a router row permuted": (permuted, r"layers\.2\.mlp\.gate\.weight differs"),
    "a tensor dropped": (dropped, r"experts\.5\.down_proj\.weight is missing"),
    "one bit": (one_bit, r"model\.norm\.weight differs .* in 1 of 128 bytes"),
}


@pytest.mark.parametrize("output", ["keep", "merge"])
@pytest.mark.parametrize("case", CHANGES)
def test_tampering_is_found_though_the_receipt_matches(made: Path, tmp_path: Path, output: str, case: str) -> None:
    change, message = CHANGES[case]
    problems = tampered(made, tmp_path, output, change)
    assert any(found(message, problem) for problem in problems), problems


def test_tampering_with_packed_integers_is_found(made: Path, tmp_path: Path) -> None:
    problems = tampered(made, tmp_path, "mixed", repacked)
    assert any(found(r"experts\.1\.down\.qweight differs .* in 1 of", problem) for problem in problems), problems


def found(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


@pytest.mark.parametrize("output", ["keep", "merge", "mixed"])
def test_an_honest_output_passes_and_nothing_is_touched(made: Path, output: str) -> None:
    before = {name: hashlib.sha256(data).digest() for name, data in contents(made).items()}
    report = verify(made / output, made / "source")
    assert report.ok, report.problems
    report.require()
    assert report.tensors > 20
    assert report.bytes_compared == sum(i.nbytes for i in Checkpoint.open(made / output).tensors.values())
    assert before == {name: hashlib.sha256(data).digest() for name, data in contents(made).items()}


def edit_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = next(key for key in ("num_experts", "num_local_experts") if key in config)
    path.write_text(json.dumps(config | {key: 8}))


def stale_shard(folder: Path) -> None:
    save_file({"model.layers.9.weight": torch.ones(2)}, folder / "model-00009-of-00009.safetensors")


def shard_that_is_read_first(folder: Path) -> None:
    save_file(load_file(folder / "model-00001-of-00004.safetensors"), folder / "model.safetensors")


def extra_tensor(folder: Path) -> None:
    name = "model-00002-of-00004.safetensors"
    save_file(load_file(folder / name) | {"model.extra.weight": torch.ones(1)}, folder / name)


def missing_shard(folder: Path) -> None:
    (folder / "model-00003-of-00004.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    path = folder / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


def code(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("x")


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"\\u00e4"', 1))


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def lying_receipt(folder: Path) -> None:
    path = folder / "receipt.json"
    receipt = json.loads(path.read_text())
    receipt["tensors"]["model.layers.0.mlp.experts.1.up_proj.weight"]["became"] = "kept"
    path.write_text(json.dumps(receipt))


def no_receipt(folder: Path) -> None:
    (folder / "receipt.json").unlink()


def plan_of_nonsense(folder: Path) -> None:
    path = folder / "plan.json"
    plan = json.loads(path.read_text())
    next(iter(plan["layers"].values()))["slots"][0] = 77
    path.write_text(json.dumps(plan))


def no_plan(folder: Path) -> None:
    (folder / "plan.json").unlink()


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "config count": (edit_config, r"config\.json: num_(local_)?experts is 8, expected 6"),
    "stale shard": (stale_shard, r"model-00009-of-00009\.safetensors is a stale shard: the index does not name it"),
    "a shard that loaders prefer": (shard_that_is_read_first, r"model\.safetensors is a stale shard"),
    "extra tensor": (extra_tensor, r"tensor model\.extra\.weight in .* does not belong there"),
    "missing shard": (missing_shard, r"model-00003-of-00004\.safetensors is missing, though the index names it"),
    "truncated shard": (truncated_shard, r"model-00003-of-00004\.safetensors is truncated"),
    "pickled weights": (pickle, r"pytorch_model\.bin are weights that no plan wrote"),
    "code": (code, r"modeling_x\.py does not belong there"),
    "another tokenizer": (other_tokenizer, r"tokenizer\.json differs from the source's"),
    "no index": (no_index, r"index\.json is missing"),
    "lying receipt": (lying_receipt, r"receipt\.json does not account for the source's tensors"),
    "no receipt": (no_receipt, r"cannot read the receipt"),
    "plan of nonsense": (plan_of_nonsense, r"slot 0 calls stored expert 77"),
    "no plan": (no_plan, r"cannot read the plan"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_tampering_with_the_folder_is_found(made: Path, tmp_path: Path, case: str) -> None:
    change, message = FOLDERS[case]
    shutil.copytree(made / "keep", tmp_path / "out")
    change(tmp_path / "out")
    report = verify(tmp_path / "out", made / "source")
    assert any(found(message, problem) for problem in report.problems), report.problems


def test_a_given_plan_outweighs_the_one_in_the_folder(made: Path, tmp_path: Path) -> None:
    """Someone who edits plan and weights alike is found by whoever kept the plan."""
    source = Checkpoint.open(made / "source")
    assert verify(made / "keep", source, plan=plan_of(source, keep)).ok
    assert not verify(made / "merge", source, plan=plan_of(source, keep)).ok


def test_the_wrong_source_and_no_output(made: Path, tmp_path: Path) -> None:
    other = miniatures.plain(tmp_path / "other", seed=1)
    (problem, *_) = verify(made / "keep", other).problems
    assert "differs from what source and plan give" in problem  # same shapes, so the same fingerprint: values tell
    with pytest.raises(OutputError, match="is no folder; name the output of apply"):
        verify(tmp_path / "nothing", made / "source")
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(made / "keep", tmp_path / "nothing")


def test_text_measures_the_divergence_again(made: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(made / "source")
    text = ["some text that nobody profiled"]
    told = apply(source, plan_of(source, mixed), tmp_path / "out", text=text).divergence
    assert verify(tmp_path / "out", source, text).divergence == told


def test_a_cap_below_the_need_is_refused(made: Path) -> None:
    with pytest.raises(BudgetError, match=r"computing .* again needs .* the smallest cap that works is"):
        verify(made / "keep", made / "source", max_ram="50MB")


def test_progress_covers_both_passes_over_the_text(made: Path) -> None:
    told: list[tuple[str, int, int]] = []
    verify(made / "keep", made / "source", text=["some words", "more"], progress=lambda *step: told.append(step))
    parts = {part: [step[1:] for step in told if step[0] == part] for part, *_ in told}
    assert list(parts) == ["computing again", "measuring"]
    for steps in parts.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0
    assert len(parts["measuring"]) == parts["measuring"][-1][1]  # one step of the source, one of the output, in turn
