"""Upcycle, mimic, prefer: equal right after upcycling, every stage trains what it should, the result is stock."""

import json

import pytest
import torch
from building import dense, logits, rows
from transformers import AutoModelForCausalLM

from moekit.blocks import blocks
from moekit.build import Material, build
from moekit.build.llava_mod import LlavaMod
from moekit.errors import MoekitError

PAIRS = [([1, 2, i], [3, 4], [5, 6]) for i in range(7, 13)]
MATERIAL = Material(rows=rows(), pairs=PAIRS, batch_size=4)
METHOD = LlavaMod(dense_steps=2, sparse_steps=2, preference_steps=2, learning_rate=1e-3, preference_rate=1e-3)


def test_without_training_it_is_the_dense_model():
    source = dense()
    built = LlavaMod(dense_steps=0, sparse_steps=0).build(dense(), MATERIAL)
    assert torch.allclose(logits(built.model), logits(source), atol=1e-5)
    assert built.report["layers"] == [0, 2]
    assert built.report["difference_after_upcycling"] < 1e-5
    assert built.no_stock is None


def test_three_stages_write_a_stock_model(folder, tmp_path):
    built = build(folder, METHOD, MATERIAL, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(built.model), atol=1e-5)
    report = json.loads((tmp_path / "out" / "build.json").read_text())
    assert report["format"] == "stock"
    assert report["builder"] == METHOD.spec
    assert {"kl"} == report["dense"].keys() - {"loss"}
    assert {"kl", "lm", "balance"} == report["sparse"].keys() - {"loss"}
    assert {"preference", "balance", "margin", "accuracy"} == report["preference"].keys() - {"loss"}


def test_attention_stays_and_the_teacher_teaches(folder):
    before = dense().state_dict()
    built = LlavaMod(teacher=str(folder), dense_steps=0, sparse_steps=3, learning_rate=1e-2, every=1).build(
        dense(1), MATERIAL
    )
    other = dense(1).state_dict()
    for name, tensor in built.model.state_dict().items():
        if "self_attn" in name or "embed" in name:
            assert torch.equal(tensor, other[name])
    assert len(blocks(built.model)) == 3
    assert built.report["sparse"]["kl"] > 0
    assert before.keys() == other.keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LlavaMod(top_k=5), "top_k=5 of 4 experts is not possible"),
        (lambda: LlavaMod(every=0), "every=0: give 1 for all layers"),
        (lambda: LlavaMod(sparse_steps=-1), "0 leaves a stage out"),
        (lambda: METHOD.build(dense(), Material(rows=rows())), "needs pairs of answers: give --pairs"),
        (lambda: METHOD.build(dense(), Material(pairs=PAIRS)), "llava-mod trains on text: give --text"),
        (lambda: LlavaMod(teacher="nowhere").build(dense(), MATERIAL), "nowhere does not exist"),
    ],
)
def test_what_is_not_possible(make, message):
    with pytest.raises(MoekitError, match=message):
        make()
