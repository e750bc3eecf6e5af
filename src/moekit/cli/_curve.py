"""The Pareto curve of a fit, bytes against predicted loss: in the terminal, as an HTML page, or as a PNG."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moekit.cli import _show
from moekit.errors import OptionError, OutputError

Curve = Sequence[tuple[int, float]]
_ROWS, _BAR = 14, 48
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px system-ui;margin:2rem;color:#222}}td,th{{padding:.15rem .8rem;text-align:right}}</style>
<h1>{title}</h1>
<p>Least predicted loss in nats per token that each size allows; the dot is the budget.</p>
<svg viewBox="0 0 720 380" width="720" role="img" aria-label="size against predicted loss">
<path d="M60 20V330H700" fill="none" stroke="#888"/>
<polyline points="{points}" fill="none" stroke="#1f6fb2" stroke-width="2"/>
<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#c0392b"/>
<text x="60" y="350">{least}</text><text x="700" y="350" text-anchor="end">{most}</text>
<text x="10" y="30">{high:.3g}</text><text x="10" y="332">{low:.3g}</text>
</svg>
<table><tr><th>size</th><th>predicted loss</th></tr>{rows}</table>
</html>
"""


def show(curve: Curve, nbytes: int) -> None:
    """A bar per size, longest where most is lost; the line nearest the result is marked."""
    points = _thinned(curve, _ROWS)
    if not points:
        return
    most = max(loss for _, loss in points) or 1.0
    nearest = min(points, key=lambda point: abs(point[0] - nbytes))
    rows = [
        (
            _show.gigabytes(size),
            f"{loss:.3g}",
            "#" * round(_BAR * loss / most) + (" <" if (size, loss) == nearest else ""),
        )
        for size, loss in points
    ]
    _show.table(("size", "predicted loss", ""), rows)


def check(path: Path) -> None:
    """Refuse a name that cannot be drawn, before any work."""
    if path.suffix not in (".html", ".png"):
        raise OptionError(f"--curve {path} must end in .html or .png")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is no folder: create it, or choose another place for {path.name}")


def write(curve: Curve, nbytes: int, path: Path, title: str) -> None:
    """Write the curve to FILE.html (self-contained) or FILE.png (needs matplotlib)."""
    if path.suffix == ".png":
        _png(curve, nbytes, path, title)
    else:
        path.write_text(_html(curve, nbytes, title), "utf-8")


def _html(curve: Curve, nbytes: int, title: str) -> str:
    sizes, losses = [size for size, _ in curve], [loss for _, loss in curve]
    left, right, low, high = min(sizes), max(sizes), min(losses), max(losses)

    def place(size: float, loss: float) -> tuple[float, float]:
        return 60 + 640 * (size - left) / max(right - left, 1), 330 - 310 * (loss - low) / max(high - low, 1e-12)

    at = min(curve, key=lambda point: abs(point[0] - nbytes))
    x, y = place(*at)
    return _PAGE.format(
        title=escape(title),
        points=" ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve),
        x=x,
        y=y,
        least=_show.gigabytes(left),
        most=_show.gigabytes(right),
        low=low,
        high=high,
        rows="".join(f"<tr><td>{_show.gigabytes(s)}</td><td>{v:.3g}</td></tr>" for s, v in _thinned(curve, 40)),
    )


def _png(curve: Curve, nbytes: int, path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("a PNG needs matplotlib: pip install 'moekit[plot]', or name a .html file") from None
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([size / 1e9 for size, _ in curve], [loss for _, loss in curve])
    at = min(curve, key=lambda point: abs(point[0] - nbytes))
    axes.plot(at[0] / 1e9, at[1], "o")
    axes.set(xlabel="size in GB", ylabel="predicted loss, nats per token", title=title)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _thinned(curve: Curve, count: int) -> list[tuple[int, float]]:
    """About `count` points, even in size, the ends included."""
    points = sorted(curve)
    if len(points) <= count:
        return points
    left, right = points[0][0], points[-1][0]
    wanted = [left + (right - left) * i / (count - 1) for i in range(count)]
    chosen = [min(points, key=lambda point: abs(point[0] - size)) for size in wanted]
    return list(dict.fromkeys(chosen))
