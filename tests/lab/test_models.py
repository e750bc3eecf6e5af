"""The embedded models: small enough, stock, documented, and as good as their cards say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moekit import lab
from moekit.errors import CheckpointError
from moekit.lab._evaluate import Live, specialisation
from moekit.measure import bits_per_byte, exact_match

FOLDERS = {"mini": lab.mini(), "dense": lab.dense()}
LIMIT_BYTES = {"mini": 16e6, "dense": 8e6}
FILES = {
    "README.md",
    "config.json",
    "figures.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_log.jsonl",
}


@pytest.fixture(scope="module")
def mini() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(lab.mini(), dtype=torch.float32)


def _figures(name: str) -> dict:
    return json.loads((FOLDERS[name] / "figures.json").read_text())


@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder_is_complete_and_small(name: str) -> None:
    files = {path.name: path.stat().st_size for path in FOLDERS[name].iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) < LIMIT_BYTES[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_log_reaches_the_last_step_of_its_recipe(name: str) -> None:
    lines = [json.loads(line) for line in (FOLDERS[name] / "training_log.jsonl").read_text().splitlines()]
    recipe = [line["recipe"] for line in lines if "recipe" in line][-1]
    assert recipe["kind"] == {"mini": "moe", "dense": "dense"}[name]
    assert max(line.get("step", 0) for line in lines) == recipe["steps"]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_card_states_the_figures(name: str) -> None:
    card, figures = (FOLDERS[name] / "README.md").read_text(), _figures(name)
    for domain, bits in figures["bits_per_byte"].items():
        assert f"| {domain} | {bits:.3f} |" in card
    for domain, score in figures["exact_match"].items():
        assert f"| {score:.1%} | {lab.task(domain).chance:.2%} |" in card


def test_the_tokenizer_is_stock_and_fits() -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab.mini())
    assert tokenizer("add: 2")["input_ids"] == list(b"add: 2")
    config = json.loads((lab.mini() / "config.json").read_text())
    assert config["vocab_size"] >= len(tokenizer)
    assert "auto_map" not in config


def test_exact_match_is_as_stated(mini: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lab.mini())
    stated = _figures("mini")["exact_match"]
    for name in lab.TASKS:
        score = exact_match(Live(mini), tokenizer, lab.examples(name, "test", 80, seed=7), batch_size=16)
        assert abs(score.mean - stated[name]) < 0.2, name


def test_it_has_learnt_text(mini: PreTrainedModel) -> None:
    """Against the entropy of single bytes (about 4.5 bits in Python), on files it never saw."""
    tokenizer = AutoTokenizer.from_pretrained(lab.mini())
    texts = {"python": [lab.text("python", "test", 8192, seed=5)]}
    assert bits_per_byte(Live(mini), texts, tokenizer, length=256)["python"].mean < 2.8


def test_no_expert_is_dead(mini: PreTrainedModel) -> None:
    figures = specialisation(mini, 256, 2048)
    assert min(figures["min_load"]) > 0.02
    assert max(figures["mutual_information_bits"]) > 0.15


def test_weights_are_bfloat16_on_disk() -> None:
    from safetensors import safe_open

    path: Path = lab.mini() / "model.safetensors"
    with safe_open(path, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_the_documentation_states_the_figures() -> None:
    page = Path(__file__).parents[2] / "docs" / "lab.md"
    lines, mini_figures, dense_figures = page.read_text().splitlines(), _figures("mini"), _figures("dense")
    for domain in lab.DOMAINS:
        bits = [f"{figures['bits_per_byte'][domain]:.3f}" for figures in (mini_figures, dense_figures)]
        row = f"| {domain} | {bits[0]} | {bits[1]} |"
        if domain in lab.TASKS:
            scores = [f"{figures['exact_match'][domain]:.1%}" for figures in (mini_figures, dense_figures)]
            row += f" {scores[0]} | {scores[1]} | {lab.task(domain).chance:.2%} |"
        assert any(line.startswith(row) for line in lines), domain


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lab, "_DATA", tmp_path)
    with pytest.raises(CheckpointError, match=r"the embedded model 'mini' is not in .*: reinstall moekit"):
        lab.mini()
