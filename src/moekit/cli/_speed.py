"""Memory against speed, drawn: as an HTML page or as a PNG."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.cli import _show
from moekit.cli._curve import check
from moekit.errors import OptionError

if TYPE_CHECKING:
    from moekit.run.tune import Point

__all__ = ["check", "write"]
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px system-ui;margin:2rem;color:#222}}td,th{{padding:.15rem .8rem;text-align:right}}</style>
<h1>{title}</h1>
<p>Tokens per second that each amount of memory for experts gives.</p>
<svg viewBox="0 0 720 380" width="720" role="img" aria-label="memory against speed">
<path d="M60 20V330H700" fill="none" stroke="#888"/>
<polyline points="{points}" fill="none" stroke="#1f6fb2" stroke-width="2"/>
<text x="10" y="30">{most:.3g}</text><text x="10" y="332">0</text>
</svg>
<table><tr><th>memory for experts</th><th>share</th><th>tokens/s</th><th>hit rate</th></tr>{rows}</table>
</html>
"""


def write(points: Sequence["Point"], path: Path, title: str) -> None:
    """Write the curve to FILE.html (self-contained) or FILE.png (needs matplotlib)."""
    if path.suffix == ".png":
        _png(points, path, title)
    else:
        path.write_text(_html(points, title), "utf-8")


def _html(points: Sequence["Point"], title: str) -> str:
    most = max((point.speed for point in points), default=1.0)
    places = [(60 + 640 * point.share, 330 - 310 * point.speed / most) for point in points]
    cells = [
        (_show.gigabytes(point.nbytes), f"{point.share:.1%}", f"{point.speed:.3g}", f"{point.hit_rate:.3f}")
        for point in points
    ]
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return _PAGE.format(title=escape(title), points=line, most=most, rows=rows)


def _png(points: Sequence["Point"], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("a PNG needs matplotlib: pip install 'moekit[plot]', or name a .html file") from None
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([point.nbytes / 1e9 for point in points], [point.speed for point in points], "o-")
    axes.set(xlabel="memory for experts, GB", ylabel="tokens per second", title=title, ylim=(0, None))
    figure.savefig(path, dpi=120, bbox_inches="tight")
