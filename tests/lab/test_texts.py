"""Texts: splits by file that never overlap, fixed order, errors, and no torch."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit import lab
from moekit.errors import OptionError, TextError
from moekit.lab import _splits, texts


@pytest.mark.parametrize("domain", lab.TEXTS)
def test_splits_never_share_a_file_or_a_text(domain: str) -> None:
    names, bodies = [], []
    for split in lab.SPLITS:
        found = lab.documents(domain, split)
        assert found
        names += [name for name, _ in found]
        bodies += [text for _, text in found]
    assert len(set(names)) == len(names)
    assert len(set(bodies)) == len(bodies)


def test_prose_of_a_file_is_in_the_split_of_its_source() -> None:
    split = {name: split for split in lab.SPLITS for name, _ in lab.documents("python", split)}
    shared = 0
    for side in lab.SPLITS:
        for name, _ in lab.documents("prose", side):
            assert split.get(name, side) == side
            shared += name in split
    assert shared > 100


def test_a_licence_paragraph_is_in_one_split_only() -> None:
    owner: dict[str, str] = {}
    for split in lab.SPLITS:
        for _, text in lab.documents("licences", split):
            for paragraph in text.split("\n\n"):
                if key := " ".join(paragraph.split()).casefold():
                    assert owner.setdefault(key, split) == split


@given(name=st.text())
def test_split_of_any_name_is_stable_and_known(name: str) -> None:
    assert _splits.split_of(name) == _splits.split_of(name)
    assert _splits.split_of(name) in lab.SPLITS


def test_split_shares() -> None:
    splits = [_splits.split_of(str(i)) for i in range(5000)]
    assert 0.77 < splits.count("train") / 5000 < 0.83
    assert 0.08 < splits.count("test") / 5000 < 0.12


@settings(max_examples=40)
@given(
    domain=st.sampled_from(lab.DOMAINS),
    split=st.sampled_from(lab.SPLITS),
    max_bytes=st.integers(1, 9000),
    seed=st.integers(0, 9),
)
def test_text_keeps_its_budget_and_repeats(domain: str, split: str, max_bytes: int, seed: int) -> None:
    first = lab.text(domain, split, max_bytes, seed)
    assert max_bytes - 4 < len(first.encode()) <= max_bytes
    assert first == lab.text(domain, split, max_bytes, seed)


@pytest.mark.parametrize("domain", lab.DOMAINS)
def test_seed_changes_the_text(domain: str) -> None:
    assert lab.text(domain, "calibration", 4000, 1) != lab.text(domain, "calibration", 4000, 2)


def test_whole_text_holds_every_document() -> None:
    whole = lab.text("python", "test")
    assert all(text in whole for _, text in lab.documents("python", "test"))


def test_passages_come_from_documents_of_the_split() -> None:
    bodies = [text for _, text in lab.documents("c", "test")]
    source = texts.passages("c", "test", 5)
    for _ in range(20):
        passage = next(source)
        assert len(passage) <= texts.PASSAGE_BYTES + 500
        assert any(passage in body for body in bodies)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lab.text("music", "test"), r"unknown domain 'music': choose one of python, prose"),
        (lambda: lab.text("python", "dev", 10), r"unknown split 'dev': choose one of train, calibration, test"),
        (lambda: lab.text("python", "test", 0), r"max_bytes is 0: ask for 1 byte or more"),
        (lambda: lab.documents("sorting", "test"), r"unknown text domain 'sorting': choose one of python"),
    ],
)
def test_errors_name_what_is_possible(call: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()  # type: ignore[operator]


def test_a_machine_without_such_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_unique", lambda domain: ())
    with pytest.raises(TextError, match="no c files for split 'test' on this machine"):
        lab.documents("c", "test")


def test_texts_and_tasks_import_no_torch() -> None:
    code = (
        "import importlib.util, sys, types; root = sys.argv[1];"
        "package = types.ModuleType('moekit'); package.__path__ = [root]; sys.modules['moekit'] = package;"
        "import moekit.lab as lab; lab.text('licences', 'test', 100); lab.examples('facts', 'test', 2);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = str(lab.mini().parent.parent)
    subprocess.run([sys.executable, "-c", code, root], check=True, timeout=300)
