"""Line charts as SVG, for documents: several panels, one legend, bands from the lowest seed to the highest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

# Okabe and Ito's colours, which colour-blind readers tell apart, in two dash patterns.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d3b")
DASHES = ("", "5 3")
_WIDTH, _HEIGHT = 300, 210  # of a panel, its margins included
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 36
_LEGEND_ROW, _LEGEND_COLUMN = 18, 225
_TICKS = 4


@dataclasses.dataclass(frozen=True)
class Line:
    """One line; all of x, y, low, high have one length."""

    label: str  # the same label has the same colour in every panel
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    x_label: str
    lines: Sequence[Line]
    y_range: tuple[float, float] | None = None  # None: from the lines


def svg(panels: Sequence[Panel], *, columns: int, title: str) -> str:
    """The panels in rows of `columns`, a legend below. `title` is what a screen reader says."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    rows = math.ceil(len(panels) / columns)
    width = columns * _WIDTH
    per_row = max(width // _LEGEND_COLUMN, 1)
    height = rows * _HEIGHT + math.ceil(len(labels) / per_row) * _LEGEND_ROW + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        x, y = place % columns * _WIDTH, place // columns * _HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel, labels), "</g>"]
    for place, label in enumerate(labels):
        x = 12 + place % per_row * _LEGEND_COLUMN
        y = rows * _HEIGHT + 12 + place // per_row * _LEGEND_ROW
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" {_stroke(labels, label)}/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, labels: Sequence[str]) -> list[str]:
    xs = [value for line in panel.lines for value in line.x] or [0.0, 1.0]
    ys = [value for line in panel.lines for value in (*line.low, *line.high)] or [0.0, 1.0]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = panel.y_range or (min(ys), max(ys))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at_x(value: float) -> float:
        return _LEFT + (value - x_low) / ((x_high - x_low) or 1) * (right - _LEFT)

    def at_y(value: float) -> float:
        return bottom - (value - y_low) / ((y_high - y_low) or 1) * (bottom - _TOP)

    parts = [f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(panel.title)}</text>']
    for tick in ticks(y_low, y_high):
        y = at_y(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{_shown(tick)}</text>')
    for tick in ticks(x_low, x_high):
        x = at_x(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="#999"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle" fill="#555">{_shown(tick)}</text>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle" fill="#333">'
        f"{escape(panel.x_label)}</text>"
    )
    for line in panel.lines:
        corners = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.high, strict=True)]
        corners += [(at_x(x), at_y(y)) for x, y in reversed(list(zip(line.x, line.low, strict=True)))]
        colour = COLOURS[labels.index(line.label) % len(COLOURS)]
        parts.append(f'<polygon points="{_points(corners)}" fill="{colour}" opacity="0.12"/>')
    for line in panel.lines:
        points = _points([(at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True)])
        parts.append(f'<polyline points="{points}" fill="none" {_stroke(labels, line.label)}/>')
    return parts


def _stroke(labels: Sequence[str], label: str) -> str:
    place = labels.index(label)
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[place % len(COLOURS)]}" stroke-width="1.8"' + (f' stroke-dasharray="{dash}"' * bool(dash))


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers between low and high: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _shown(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"
