"""Pictures for a page that needs nothing else: heat maps as inline SVG, their cells as one small PNG each."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

HOT = ((0.0, "#141a26"), (0.2, "#2b2f6b"), (0.42, "#7b2f8e"), (0.64, "#d6456b"), (0.84, "#fb9a4b"), (1.0, "#fdf3b4"))
"""From nothing to much, for a dark page."""
COOL = ((0.0, "#141a26"), (0.25, "#123f5c"), (0.5, "#14787f"), (0.75, "#4dbd83"), (1.0, "#e9f7a6"))
TWO_SIDED = ((0.0, "#3f8ef0"), (0.35, "#1f3f6e"), (0.5, "#141a26"), (0.65, "#7a3340"), (1.0, "#ff7a59"))
DOMAINS = (
    "#5aa9ff", "#ffb454", "#7ee08a", "#f28cb1", "#b794f6", "#4fd6d2", "#f2e06b", "#ff6b57", "#9aa8ff", "#c7e86b",
    "#e58fff", "#d9b38c",
)  # fmt: skip
_BACKGROUND = "#141a26"
_MOST_TITLES = 2500
_LABEL = 'font-size="10" fill="#8b95a7"'


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)


def colours(values: np.ndarray, stops: Sequence[tuple[float, str]]) -> np.ndarray:
    """uint8 [..., 3] for values in 0..1; nan is drawn as background."""
    at = np.array([stop for stop, _ in stops])
    table = np.stack([_rgb(colour) for _, colour in stops])
    clean = np.nan_to_num(np.clip(values, 0, 1), nan=0.0)
    picture = np.stack([np.interp(clean, at, table[:, channel]) for channel in range(3)], axis=-1)
    picture[np.isnan(values)] = _rgb(_BACKGROUND)
    return picture.round().astype(np.uint8)


def blend(strength: np.ndarray, which: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: the colour of domain ``which``, as strong as ``strength`` in 0..1."""
    table = np.stack([_rgb(colour) for colour in DOMAINS])
    ground, colour = _rgb(_BACKGROUND), table[which % len(DOMAINS)]
    return (ground + np.clip(strength, 0, 1)[..., None] * (colour - ground)).round().astype(np.uint8)


def png(pixels: np.ndarray) -> str:
    """A data URI of uint8 [height, width, 3]."""
    height, width = pixels.shape[:2]
    raw = b"".join(b"\0" + pixels[row].tobytes() for row in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def heat_map(
    pixels: np.ndarray,
    *,
    rows: Sequence[str] = (),
    titles: Sequence[Sequence[str]] = (),
    columns: str = "",
    width: int = 960,
    label: str = "",
) -> str:
    """SVG of uint8 [R, C, 3], one cell each. ``titles`` are shown under the pointer, where there are not too many."""
    num_rows, num_columns = pixels.shape[:2]
    left = 30 if rows else 0
    cell = (width - left) / num_columns
    high = min(max(cell, 7.0), 26.0) if rows else cell
    height, bottom = high * num_rows, 22 if columns else 0
    parts = [
        f'<svg viewBox="0 0 {width} {height + bottom:.1f}" role="img" aria-label="{escape(label or columns)}">',
        f'<image x="{left}" y="0" width="{width - left}" height="{height:.1f}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{png(pixels)}"/>',
    ]
    step = max(1, round(12 / high)) if rows else 1
    parts += [
        f'<text x="{left - 6}" y="{(i + 0.5) * high + 3.5:.1f}" text-anchor="end" {_LABEL}>{escape(name)}</text>'
        for i, name in enumerate(rows)
        if i % step == 0
    ]
    if columns:
        every = max(1, -(-num_columns // 32))
        parts += [
            f'<text x="{left + (i + 0.5) * cell:.1f}" y="{height + 14:.1f}" text-anchor="middle" {_LABEL}>{i}</text>'
            for i in range(0, num_columns, every)
        ]
    if titles and num_rows * num_columns <= _MOST_TITLES:
        parts += [
            f'<rect class="c" x="{left + j * cell:.2f}" y="{i * high:.2f}" width="{cell:.2f}" height="{high:.2f}">'
            f"<title>{escape(text)}</title></rect>"
            for i, row in enumerate(titles)
            for j, text in enumerate(row)
        ]
    return "".join([*parts, "</svg>"])


def curves(lines: Sequence[np.ndarray], labels: Sequence[str], *, width: int = 460, height: int = 230) -> str:
    """SVG of rising curves in 0..1, each over its own share 0..1 of experts; the first is cool, the last hot."""
    left, bottom, top = 34, 26, 8
    wide, high = width - left - 20, height - bottom - top
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="coverage">']
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, x = top + (1 - mark) * high, left + mark * wide
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#252d3d"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end" {_LABEL}>{mark:.0%}</text>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle" {_LABEL}>{mark:.0%}</text>')
    shades = colours(np.linspace(0.35, 0.95, max(len(lines), 2)), HOT)
    for line, label, shade in zip(lines, labels, shades, strict=False):
        across = np.linspace(0, 1, len(line))
        points = " ".join(
            f"{left + x * wide:.1f},{top + (1 - y) * high:.1f}" for x, y in zip(across, line, strict=True)
        )
        colour = "#" + "".join(f"{int(c):02x}" for c in shade)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"><title>')
        parts.append(f"{escape(label)}</title></polyline>")
    return "".join([*parts, "</svg>"])


def scale(stops: Sequence[tuple[float, str]]) -> str:
    """The CSS gradient of a colour scale, for a legend."""
    return "linear-gradient(90deg," + ",".join(f"{colour} {stop:.0%}" for stop, colour in stops) + ")"
