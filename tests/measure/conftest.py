"""Shared by the tests of measuring."""

import pytest
from measuring import ByteTokenizer, Loaded, make_model


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def runners():
    return Loaded(make_model(0)), Loaded(make_model(1))
