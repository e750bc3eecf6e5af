"""A tiny model with a tokenizer, and text in two domains."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parent.parent / "checkpoint"))

TEXTS = {
    "words": ["the cat sat on the mat. " * 12, "a short one", "xyz " * 70],
    "code": ["def f(x):\n    return x + 1\n" * 20],
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of a saved tiny model."""
    import miniatures

    return miniatures.plain(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture(scope="session")
def observed(saved):
    """Every statistic there is, over both domains."""
    from moekit.profile import FIELDS, profile

    return profile(saved, TEXTS, sequence_length=48, statistics=list(FIELDS), device="cpu")
