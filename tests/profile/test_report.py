"""The page and the tables: complete, self-contained, true to the figures."""

import base64
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from moekit.errors import OutputError
from moekit.profile import _charts as charts
from moekit.profile.report import page
from moekit.profile.tables import carrying, effective_experts, load, specialists


class Strict(HTMLParser):
    """Collects tags and attributes, and insists that they close in order."""

    VOID = {"meta", "input", "link", "br", "img", "hr"}

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    return parser


def pixels(uri):
    """What a data URI of a PNG shows: uint8 [H, W, 3]."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    raw = zlib.decompress(data[start + 4 : start + 4 + length])
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(height, 1 + 3 * width)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, 3)


def test_the_page_needs_nothing_else(observed):
    text = page(observed)
    parser = parsed(text)
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert "script" not in parser.seen
    assert "link" not in parser.seen
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_page_shows_every_part_and_is_the_same_every_time(observed, tmp_path):
    text = page(observed)
    for words in ("Who does what", "Expert load", "Output norms", "Contribution", "Coverage", "How far to trust it",
                  "Chosen together", "Specialists", *observed.domains, observed.fingerprint[:16]):  # fmt: skip
        assert words in text, words
    assert page(observed) == text
    observed.report(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == text
    with pytest.raises(OutputError, match="exists already"):
        observed.report(tmp_path / "a.html", overwrite=False)


def test_names_cannot_break_the_page(observed):
    odd = "<script>alert(1)</script>"
    layers = {n: replace(layer, domains=(odd, "b")) for n, layer in observed.layers.items()}
    text = page(replace(observed, model="</title><b>", domains=(odd, "b"), layers=layers))
    assert "<script>" not in text
    parsed(text)


def test_a_profile_of_counts_alone_has_a_smaller_page(observed):
    layers = {
        n: replace(layer, arrays={k: layer.arrays[k] for k in ("counts", "tokens")})
        for n, layer in observed.layers.items()
    }
    text = page(replace(observed, layers=layers))
    assert "Output norms" not in text
    assert "Chosen together" not in text
    parsed(text)


def test_pictures_hold_the_figures(observed):
    values = np.array([[0.0, 0.5, 1.0], [np.nan, 2.0, -1.0]])
    picture = charts.colours(values, charts.HOT)
    svg = charts.heat_map(picture, rows=["a", "b"], columns="expert", titles=[["x"] * 3] * 2)
    (uri,) = re.findall(r'href="(data:[^"]+)"', svg)
    assert np.array_equal(pixels(uri), picture)
    assert picture[0, 0].tolist() == picture[1, 0].tolist() == [0x14, 0x1A, 0x26]
    assert picture[0, 2].tolist() == picture[1, 1].tolist() == [0xFD, 0xF3, 0xB4]
    assert svg.count("<title>") == 6
    large = charts.heat_map(np.zeros((64, 64, 3), np.uint8), titles=[["x"] * 64] * 64)
    assert "<title>" not in large, "a page of a large model must stay small"


def test_tables_say_what_the_profile_says(observed):
    by_title = {table.title: table for table in observed.tables(least=10**9)}
    assert set(by_title) == {"Text", "Layers", "Specialists", "Starved experts"}
    for table in by_title.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert sum(row[1] for row in by_title["Text"].rows) == observed.num_tokens
    assert len(by_title["Layers"].rows) == len(observed.layers)
    assert [row[1] for row in by_title["Starved experts"].rows] == [8] * len(observed.layers)
    assert "Starved experts" not in {table.title for table in observed.tables(least=0)}


def test_figures_of_a_layer(observed):
    layer = next(iter(observed.layers.values()))
    counts = np.zeros_like(layer.counts)
    counts[0, 0, 0] = [8, 4, 4, 0, 0, 0, 0, 0]
    counts[0, 1, 0] = [0, 0, 4, 4, 0, 0, 0, 0]
    made = replace(layer, arrays={**layer.arrays, "counts": counts, "gate_norm": counts})
    assert load(made).tolist() == pytest.approx([8 / 3, 4 / 3, 8 / 3, 4 / 3, 0, 0, 0, 0])
    assert effective_experts(made) == pytest.approx(np.exp(-2 * (1 / 3 * np.log(1 / 3) + 1 / 6 * np.log(1 / 6))))
    assert carrying(made, "gate_norm", 0.6) == 2
    assert carrying(made, "gate_norm", 1.0) == 4
    assert specialists(made, "words")[0] == (0, pytest.approx(2.0))
    assert [expert for expert, _ in specialists(made, "code")] == [3, 2]
