"""What is shown: sizes, numbers, JSON that every reader takes, curves, generated pages."""

import contextlib
import io
import json

import numpy as np
import pytest

from moekit.cli import _curve, _show, docs
from moekit.errors import OptionError, OutputError


@pytest.mark.parametrize(
    ("size", "text"), [(6_000_000_000, "6.0 GB"), (149_999_999, "0.1 GB"), (11_409_408, "11.4 MB"), (500, "0.0 MB")]
)
def test_sizes(size, text):
    assert _show.gigabytes(size) == text


@pytest.mark.parametrize(("count", "text"), [(7_240_000_000, "7.2B"), (5_682_624, "5.7M"), (950, "950")])
def test_parameters(count, text):
    assert _show.parameters(count) == text


def test_json_is_plain(capsys):
    _show.emit({"a": float("nan"), "b": np.float64(0.5), "c": (1, np.arange(2)), 3: None, "p": io.StringIO})
    found = json.loads(capsys.readouterr().out)
    assert (found["a"], found["b"], found["c"], found["3"]) == (None, 0.5, [1, [0, 1]], None)


def test_tables_keep_what_looks_like_markup(capsys):
    _show.table(("x", "y"), [("I[e] = [bold]", 0.123456), ("z", None)])
    out = capsys.readouterr().out
    assert "I[e] = [bold]" in out
    assert "0.1235" in out
    assert "\x1b" not in out


def test_progress_is_silent_when_piped(capsys, monkeypatch):
    monkeypatch.setattr(_show, "_PATIENCE", -1)
    with _show.progress("work") as advance:
        advance(1, 2, "one part")
        advance(0.5, 3, "another")
    assert capsys.readouterr() == ("", "")


def test_progress_shows_the_part_and_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(_show, "_PATIENCE", -1)
    with _show.progress("apply") as advance:
        advance(1, 2, "writing")
    assert "apply: writing" in screen.getvalue()
    assert "left" in screen.getvalue()
    assert "1/2" in screen.getvalue()
    quick = Terminal()
    monkeypatch.setattr("sys.stderr", quick)
    monkeypatch.setattr(_show, "_PATIENCE", 1000)
    with _show.progress("apply") as advance:
        advance(1, 2, "writing")
    assert "writing" not in quick.getvalue()


@pytest.mark.parametrize(("on", "said"), [(True, "after\n"), (False, "before\nafter\n")])
def test_silence(capsys, on, said):
    with _show.silenced(on):
        _show.say("before")
    _show.say("after")
    assert capsys.readouterr().out == said


CURVE = [(1000 * i, 1.0 / i) for i in range(1, 60)]


def test_curve_in_the_terminal_marks_the_result(capsys):
    _curve.show(CURVE, 30_000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert sum(line.rstrip().endswith("<") for line in lines) == 1
    _curve.show([], 1)
    assert capsys.readouterr().out == ""


def test_curve_files(tmp_path):
    page = tmp_path / "curve.html"
    _curve.write(CURVE, 30_000, page, "a <b>")
    text = page.read_text()
    assert "a &lt;b&gt;" in text
    assert text.count("<tr>") == 41
    assert "http" not in text
    pytest.importorskip("matplotlib")
    _curve.write(CURVE, 30_000, tmp_path / "curve.png", "title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_needs_a_name_it_can_be_drawn_to(tmp_path):
    with pytest.raises(OptionError, match=r"\.html or \.png"):
        _curve.check(tmp_path / "curve.pdf")
    with pytest.raises(OutputError, match="is no folder"):
        _curve.check(tmp_path / "nowhere" / "curve.html")


def test_generated_pages_are_what_the_code_says_now():
    assert docs.stale() == []


def test_a_stale_page_is_found(tmp_path):
    for name, text in docs.pages().items():
        (tmp_path / name).write_text(text)
    assert docs.stale(tmp_path) == []
    (tmp_path / "cli.md").write_text("by hand")
    (tmp_path / "systems.md").unlink()
    assert docs.stale(tmp_path) == ["cli.md", "systems.md"]


@pytest.fixture
def bars(monkeypatch):
    """Every (label, done, total, part) a bar is told, and when bars open and close."""
    told = []

    @contextlib.contextmanager
    def progress(label):
        told.append(("open", label))
        yield lambda done, total, what="": told.append((label, done, total, what))
        told.append(("close", label))

    monkeypatch.setattr(_show, "progress", progress)
    return told


def test_runners_side_by_side_share_one_bar(bars):
    class Runner:
        model = None

        def forward(self, batches, on_layer):
            for done, batch in enumerate(batches, 1):
                on_layer(done, len(batches))
                yield batch

    one = _show.Watched(Runner(), "run")
    two = one.beside(Runner())
    assert list(zip(one.forward([1, 2]), two.forward([3, 4]), strict=True)) == [(1, 3), (2, 4)]
    assert bars[0] == ("open", "run")
    assert bars[-1] == ("close", "run")
    assert [bar[1:3] for bar in bars[1:-1]] == [(1, 2), (2, 4), (3, 4), (4, 4)]
    list(one.forward([1]))
    assert bars.count(("open", "run")) == bars.count(("close", "run")) == 2


def test_parts_tell_where_within_a_step(bars):
    with _show.parts("fit") as tell:
        tell("measuring plans", 2, 5)
        tell.inside(1, 4)
    assert bars == [
        ("open", "fit"),
        ("fit", 2, 5, "measuring plans"),
        ("fit", 2.25, 5, "measuring plans"),
        ("close", "fit"),
    ]


def test_a_watched_runner_gives_what_the_runner_gives():
    class Runner:
        model = "model"

        def forward(self, batches, on_layer):
            for done, batch in enumerate(batches, 1):
                on_layer(done, len(batches))
                yield batch * 2

    watched = _show.Watched(Runner(), "run")
    assert watched.model == "model"
    assert list(watched.forward([1, 2])) == [2, 4]
