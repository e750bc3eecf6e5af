"""Text from files: what is read, and what is refused in one line."""

import json

import pytest

from moekit.errors import TextError
from moekit.profile import read_texts
from moekit.profile.texts import check_texts


class Templated:
    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize):
        if not all("role" in message for message in messages):
            raise ValueError("a message has no role\nmore detail")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class Untemplated:
    chat_template = None


def test_plain_files_are_one_document_each_and_domains_join(tmp_path):
    for name, text in (("a.txt", "one\ntwo"), ("b.md", "three"), ("c.txt", "four")):
        (tmp_path / name).write_text(text)
    found = read_texts([str(tmp_path / "a.txt"), f"code={tmp_path / 'b.md'}", f"code={tmp_path / 'c.txt'}"])
    assert found == {"text": ["one\ntwo"], "code": ["three", "four"]}


def test_jsonl_holds_text_or_chats(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    lines = [json.dumps({"text": "first"}), "", json.dumps({"messages": chat}), json.dumps({"text": "  "})]
    path.write_text("\n".join(lines))
    assert read_texts([f"d={path}"], Templated()) == {"d": ["first", "<user>hi<assistant>hello"]}


def test_a_line_separator_inside_a_json_string_does_not_cut_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_texts([str(path)]) == {"text": ["one\u2028two"]}


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_texts([str(tmp_path / "a.txt")]) == {"text": ["hello"]}


def test_a_path_with_an_equals_sign_is_still_a_path(tmp_path):
    (tmp_path / "a=b.txt").write_text("hello")
    assert read_texts([str(tmp_path / "a=b.txt")]) == {"text": ["hello"]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty: give a file with text"),
        ("a.txt", b" \n\t", "is empty"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 \(byte 3 is 0xe9\): convert it first"),
        ("a.jsonl", b"{oops", "line 1 is not JSON: a .jsonl file has one object per line"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}', r"line 2 holds keys body: expected an object with 'text'"),
        ("a.jsonl", b"[1]", "line 1 holds a list: expected an object"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.jsonl", b'{"messages": []}', "is a chat, but the model's tokenizer has no chat template"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=words) as caught:
        read_texts([str(tmp_path / name)], Untemplated())
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(TextError, match="does not exist: --text takes FILE or DOMAIN=FILE"):
        read_texts([str(tmp_path / "none.txt")])
    with pytest.raises(TextError, match="cannot be read: Is a directory"):
        read_texts([str(tmp_path)])
    with pytest.raises(TextError, match="no text was given: name at least one file"):
        read_texts([])


def test_a_template_that_fails_is_told_in_its_own_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"content": "x"}]}')
    with pytest.raises(TextError, match=r"cannot render these messages: a message has no role$"):
        read_texts([str(tmp_path / "a.jsonl")], Templated())


def test_texts_from_python():
    assert check_texts(["a", " "]) == {"text": ["a"]}
    assert check_texts({"d": "one document"}) == {"d": ["one document"]}
    for bad, words in (
        ("abc", "must be a mapping"),
        ({}, "no text was given"),
        ({"d": [""]}, "domain 'd' holds no text"),
        ({"d": [3]}, "domain 'd' holds a int; documents must be strings"),
    ):
        with pytest.raises(TextError, match=words):
            check_texts(bad)
