"""A comparison drawn: bytes against loss, a line per method; as JSON, as one self-contained page, and as a PNG."""

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.cli import _show

if TYPE_CHECKING:
    from moekit.compress import Comparison

_COLOURS = (
    "#1f6fb2",
    "#c0392b",
    "#2e8b57",
    "#8e44ad",
    "#d68910",
    "#16a085",
    "#7f8c8d",
    "#2c3e50",
    "#d81b60",
    "#5d4037",
)
_DASHES = ("-", "--", ":", "-.")
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px system-ui;margin:2rem;color:#222}}td,th{{padding:.15rem .8rem;text-align:right}}
td:first-child,td:nth-child(2){{text-align:left}}</style>
<h1>{title}</h1>
<p>KL divergence from the source in nats per token (log scale) on text nothing was chosen by, against the bytes of the
weight files; lower is better. {seeds}</p>
<svg viewBox="0 0 960 460" width="960" role="img" aria-label="size against loss">{drawing}</svg>
{tables}
</html>
"""


def write(found: "Comparison", folder: Path) -> None:
    """compare.json, compare.html and, with matplotlib, compare.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", "utf-8")
    (folder / "compare.html").write_text(page(found), "utf-8")
    if can_plot():
        png(found, folder / "compare.png")


def can_plot() -> bool:
    """Whether matplotlib is there."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def lines(found: "Comparison") -> dict[str, list[tuple[int, float]]]:
    """(bytes, loss) of every method, by size."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in found.rows():
        points.setdefault(row.method, []).append((row.nbytes, max(row.kl.mean, 1e-7)))
    return {name: sorted(line) for name, line in points.items()}


def png(found: "Comparison", path: Path) -> None:
    """With matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    for place, (name, line) in enumerate(lines(found).items()):
        ours = name == "fit"
        axes.plot(
            [size / 1e6 for size, _ in line],
            [loss for _, loss in line],
            marker="o",
            label=name,
            color="black" if ours else _COLOURS[place % len(_COLOURS)],
            linestyle="-" if ours else _DASHES[place // len(_COLOURS) % len(_DASHES)],
            linewidth=3 if ours else 1.5,
        )
    axes.set(xlabel="weight files, MB", ylabel="KL from the source, nats per token", yscale="log", title=found.model)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def page(found: "Comparison") -> str:
    """One page that needs nothing else."""
    count = len(found.seeds)
    tables = []
    for ratio in found.ratios:
        rows = [row for row in found.rows() if row.ratio == ratio]
        body = "".join(
            f"<tr><td>{escape(row.method)}</td><td>{escape(row.setting)}</td><td>{_show.gigabytes(row.nbytes)}</td>"
            f"<td>{escape(str(row.kl))}</td></tr>"
            for row in rows
        )
        head = "<tr><th>method</th><th>setting</th><th>size</th><th>KL</th></tr>"
        tables.append(f"<h2>{ratio:.0%} of the bytes removed</h2><table>{head}{body}</table>")
    return _PAGE.format(
        title=escape(f"{found.model}: methods at equal bytes"),
        seeds=f"Means over {count} seeds." if count > 1 else "One seed.",
        drawing=_svg(lines(found)),
        tables="".join(tables),
    )


def _svg(points: dict[str, list[tuple[int, float]]]) -> str:
    import math

    every = [point for line in points.values() for point in line]
    if not every:
        return ""
    left, right = min(s for s, _ in every), max(s for s, _ in every)
    low, high = (math.log10(f(v for _, v in every)) for f in (min, max))

    def place(size: int, loss: float) -> str:
        x = 70 + 600 * (size - left) / max(right - left, 1)
        return f"{x:.1f},{420 - 390 * (math.log10(loss) - low) / max(high - low, 1e-9):.1f}"

    parts = [
        '<path d="M70 20V420H690" fill="none" stroke="#888"/>',
        f'<text x="70" y="445">{_show.gigabytes(left)}</text>',
        f'<text x="690" y="445" text-anchor="end">{_show.gigabytes(right)}</text>',
        f'<text x="5" y="32">{10**high:.2g}</text><text x="5" y="424">{10**low:.2g}</text>',
    ]
    for number, (name, line) in enumerate(points.items()):
        colour, y = _COLOURS[number % len(_COLOURS)], 30 + 18 * number
        where = [place(*point) for point in line]
        parts.append(f'<polyline points="{" ".join(where)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="4" fill="{colour}"/>' for p in where]
        parts.append(f'<text x="705" y="{y}" fill="{colour}" font-size="13">{escape(name)}</text>')
    return "".join(parts)
