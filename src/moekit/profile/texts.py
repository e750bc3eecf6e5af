"""Text from files: plain, JSONL with ``text``, or JSONL with chat ``messages``; several named domains."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekit.errors import TextError

DEFAULT_DOMAIN = "text"
_JSON_ENDINGS = (".jsonl", ".ndjson")


def read_texts(specs: Sequence[str], tokenizer: Any = None) -> dict[str, list[str]]:
    """Documents by domain from ``--text`` arguments: ``FILE`` or ``DOMAIN=FILE``, repeated as often as wanted.

    A plain file is one document. A JSONL file has one per line: the string under ``text``, or the chat under
    ``messages`` as ``tokenizer``'s own template renders it. Files of one domain are joined in the order given.

    Raises:
        TextError: a file that is missing, empty, not UTF-8, not JSON, or holds neither text nor messages; chat without
            a template to render it.
    """
    domains: dict[str, list[str]] = {}
    for spec in specs:
        domain, path = _split(spec)
        documents = [text for text in _documents(path, tokenizer) if text.strip()]
        if not documents:
            raise TextError(f"{path} holds no text: give a file with some")
        domains.setdefault(domain, []).extend(documents)
    if not domains:
        raise TextError("no text was given: name at least one file, as FILE or DOMAIN=FILE")
    return domains


Document = str | np.ndarray
"""A text, or its token ids: integers [T]."""


def check_texts(texts: Any) -> dict[str, list[Document]]:
    """Texts given from Python, with the same promises: at least one domain, none of them empty.

    A document may be an array of token ids instead of a string.
    """
    if isinstance(texts, str):
        raise TextError("texts must be a mapping of domain to documents, such as {'code': ['...']}, found one string")
    checked: dict[str, list[Document]] = {}
    for domain, documents in texts.items() if hasattr(texts, "items") else [(DEFAULT_DOMAIN, texts)]:
        found = _checked(domain, documents)
        checked[str(domain)] = [text for text in found if (text.strip() if isinstance(text, str) else len(text))]
        if not checked[str(domain)]:
            raise TextError(f"domain '{domain}' holds no text: give at least one document that is not empty")
    if not checked:
        raise TextError("no text was given: name at least one domain")
    return checked


def _checked(domain: object, documents: Iterable[Any]) -> list[Document]:
    documents = [documents] if isinstance(documents, str) else list(documents)
    for document in documents:
        if isinstance(document, np.ndarray):
            if document.ndim != 1 or document.dtype.kind not in "iu" or (len(document) and document.min() < 0):
                raise TextError(
                    f"domain '{domain}' holds an array that is no list of token ids: they are whole numbers"
                )
        elif not isinstance(document, str):
            raise TextError(f"domain '{domain}' holds a {type(document).__name__}; documents must be strings")
    return documents


def _split(spec: str) -> tuple[str, Path]:
    """``code=a.jsonl`` -> (code, a.jsonl). A name with a path separator in it is part of the path."""
    name, found, rest = spec.partition("=")
    if found and name and "/" not in name and "\\" not in name and not Path(spec).exists():
        return name.strip(), Path(rest).expanduser()
    return DEFAULT_DOMAIN, Path(spec).expanduser()


def _documents(path: Path, tokenizer: Any) -> Iterator[str]:
    text = _decoded(path)
    if path.suffix.lower() not in _JSON_ENDINGS:
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _record(line, f"{path} line {number}", tokenizer)


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path} does not exist: --text takes FILE or DOMAIN=FILE") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from None
    if not raw.strip():
        raise TextError(f"{path} is empty: give a file with text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}): convert it first"
        ) from None


def _record(line: str, where: str, tokenizer: Any) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise TextError(f"{where} is not JSON: a .jsonl file has one object per line") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return _chat(record["messages"], where, tokenizer)
    found = f"keys {', '.join(map(str, record))}" if isinstance(record, dict) else f"a {type(record).__name__}"
    raise TextError(f"{where} holds {found}: expected an object with 'text' (a string) or 'messages' (a chat)")


def _chat(messages: list[Any], where: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise TextError(f"{where} is a chat, but the model's tokenizer has no chat template: give it as 'text'")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(f"{where}: the chat template cannot render these messages: {reason}") from None
