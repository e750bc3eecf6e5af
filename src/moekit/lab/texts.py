"""Real text that is on every machine with Python, torch and numpy: no download, four domains, three splits.

A document is a file (for `prose`, a documentation topic or the docstrings of one source file); a document belongs to
exactly one split by the hash of its name. What is found depends on the Python version and on the installed packages.
"""

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from moekit.errors import OptionError, TextError
from moekit.lab._splits import check_split, split_of

Document = tuple[str, str]

PASSAGE_BYTES = 2048
LICENCE_PART_BYTES = 4096
_NOT_PYTHON = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "_bundled"}
# Every machine has torch (a dependency); of its headers these are written by hand, the rest is mostly generated.
_HEADER_FOLDERS = ("c10", "ATen/core", "ATen/native", "ATen/cpu", "torch/csrc")
_LICENCE_NAMES = ("LICEN", "COPYING", "NOTICE")


def _folder(key: str) -> Path:
    return Path(sysconfig.get_path(key))


def _read(path: Path) -> str | None:
    """Return the text of a file, or None where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _files(root: Path, pattern: str) -> Iterator[Document]:
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if path.is_file() and (text := _read(path)):
            yield name, text


@cache
def _python() -> list[Document]:
    """The standard library's sources, without its tests and without tables of characters."""
    root = _folder("stdlib")
    paths = sorted(path for path in root.rglob("*.py") if not _NOT_PYTHON & set(path.relative_to(root).parts))
    documents = ((path.relative_to(root).as_posix(), _read(path)) for path in paths)
    return [(name, text) for name, text in documents if text]


def _docstrings(source: str) -> str:
    """Return the docstrings of a module, its classes and its functions, one paragraph apart."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return "\n\n".join(text for text in found if text and len(text) > 60)


def _prose() -> list[Document]:
    """Documentation topics of the interpreter, then the docstrings of each source file (in that file's split)."""
    from pydoc_data.topics import topics

    documents = [(f"topic/{name}", text) for name, text in sorted(topics.items())]
    documents += [(name, _docstrings(source)) for name, source in _python()]
    return [(name, text + "\n") for name, text in documents if text]


def _c() -> list[Document]:
    """C and C++ headers of the interpreter, numpy and torch."""
    packages = _folder("platlib")
    roots = [("python", _folder("include")), ("numpy", packages / "numpy")]
    roots += [(f"torch/{name}", packages / "torch" / "include" / name) for name in _HEADER_FOLDERS]
    return [(f"{key}/{name}", text) for key, root in roots for name, text in _files(root, "*.h")]


def _licences() -> list[Document]:
    """Licences of the interpreter and the installed packages; a paragraph seen before is left out.

    Licences repeat each other, so splitting by file alone would put the same paragraph on both sides. A few are long:
    parts of about 4 KB are the documents, or whole splits would be decided by one file.
    """
    root = _folder("purelib")
    packages = [
        (name, text)
        for name, text in _files(root, "*.dist-info/**/*")
        if any(word in Path(name).name.upper() for word in _LICENCE_NAMES)
    ]
    seen: set[str] = set()
    documents: list[Document] = []
    for name, text in [*_files(_folder("stdlib"), "LICENSE*"), *packages]:
        part = ""
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split()).casefold()
            if key and key not in seen:
                seen.add(key)
                part += paragraph + "\n\n"
            if len(part) > LICENCE_PART_BYTES:
                documents.append((f"{name}#{len(documents)}", part))
                part = ""
        if part:
            documents.append((f"{name}#{len(documents)}", part))
    return documents


_SOURCES: dict[str, Callable[[], list[Document]]] = {"python": _python, "prose": _prose, "c": _c, "licences": _licences}
TEXTS: tuple[str, ...] = tuple(_SOURCES)


@cache
def _unique(domain: str) -> tuple[Document, ...]:
    seen: set[str] = set()
    kept = []
    for name, text in _SOURCES[domain]():
        if text not in seen:
            seen.add(text)
            kept.append((name, text))
    return tuple(kept)


def documents(domain: str, split: str) -> list[Document]:
    """Return (name, text) of every document of a text domain in one split, in a fixed order, without duplicates.

    Raises OptionError for an unknown domain or split, TextError where this machine has no such files.
    """
    check_split(split)
    if domain not in _SOURCES:
        raise OptionError(f"unknown text domain {domain!r}: choose one of {', '.join(TEXTS)}")
    found = [(name, text) for name, text in _unique(domain) if split_of(name) == split]
    if not found:
        raise TextError(f"no {domain} files for split {split!r} on this machine: choose another domain")
    return found


def _passages(text: str, rng: random.Random) -> str:
    """Return about PASSAGE_BYTES of a document, from a line chosen at random."""
    lines = text.splitlines(keepends=True)
    total = sum(len(line) for line in lines)
    if total <= PASSAGE_BYTES:
        return text
    offset = rng.randrange(total - PASSAGE_BYTES + 1)
    passage, seen = "", 0
    for line in lines:
        if seen >= offset and passage and len(passage) + len(line) > PASSAGE_BYTES:
            break
        passage += line if seen >= offset else ""
        seen += len(line)
    return passage or text[offset : offset + PASSAGE_BYTES]


def passages(domain: str, split: str, seed: int) -> Iterator[str]:
    """Yield passages of about 2 KB from the split's documents in an order drawn from `seed`, without end.

    A small budget thus sees many files. Draws come in passes: each document once, then each once more elsewhere.
    """
    found = documents(domain, split)
    rng = random.Random(f"{domain}/{split}/{seed}")
    while True:
        for _, text in rng.sample(found, len(found)):
            yield _passages(text, rng)
