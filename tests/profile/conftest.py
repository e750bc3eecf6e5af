"""A tiny model with a tokenizer, and text in two domains."""

import pytest

TEXTS = {
    "words": ["the cat sat on the mat. " * 12, "a short one", "xyz " * 70],
    "code": ["def f(x):\n    return x + 1\n" * 20],
}


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
