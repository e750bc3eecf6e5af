"""The tokenizer: a byte is a token, any text survives the round trip, saved and loaded by stock AutoTokenizer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moekit.lab._tokens import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, byte_symbols, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(512).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips_as_its_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "  a b ", "\r\n\t\x00", "don't , stop .", "naive \u00ef \U0001f600", "\u0120x"]
)
def test_awkward_texts(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode()), skip_special_tokens=True) == text


def test_specials(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert len(tokenizer) == 259 <= VOCAB_SIZE
    assert tokenizer.decode([72, 105, EOS_ID], skip_special_tokens=True) == "Hi"
    assert tokenizer.model_max_length == 512


def test_symbols_are_one_to_one() -> None:
    assert len(set(byte_symbols())) == 256
