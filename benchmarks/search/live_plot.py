"""Curves with bands over a logarithmic axis, as an SVG without any plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["Curve", "draw_curves"]

WIDTH, HEIGHT = 940, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 64, 60
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#8c564b", "#6a3d9a", "#b8a100",
           "#17becf", "#e377c2", "#2f4f4f", "#a65628")  # fmt: skip
LABEL_GAP = 15.0
GREY = "#666666"
Place = Callable[[float], float]


@dataclass(frozen=True)
class Curve:
    """A named line.

    Attributes:
        points: (x, y), x ascending and positive.
        band: (low, high) at each point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]]


def draw_curves(
    path: Path,
    title: str,
    curves: Sequence[Curve],
    levels: Mapping[str, float],
    *,
    subtitle: str = "",
    emphasis: str = "",
) -> None:
    """Write the drawing.

    Args:
        levels: Horizontal lines, by name.
        subtitle: What is drawn, in small print under the title.
        emphasis: Name of the curve that is drawn thicker.
    """
    xs = [x for c in curves for x, _ in c.points]
    ys = [*levels.values(), *(v for c in curves for low_high in c.band for v in low_high)]
    low, high = min(ys) - 0.01, max(ys) + 0.01
    first, last = math.log(min(xs)), math.log(max(xs))

    def x_at(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (0.5 if last == first else (math.log(x) - first) / (last - first))

    def y_at(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="26" font-size="16">{escape(title)}</text>',
        f'<text x="{LEFT}" y="46" fill="{GREY}">{escape(subtitle)}</text>',
        *_axes(sorted(set(xs)), low, high, x_at, y_at),
    ]
    for value in levels.values():
        parts.append(_line([(LEFT, y_at(value)), (WIDTH - RIGHT, y_at(value))], "#999999", 1, dash="4 4"))
    colours = {c.name: COLOURS[i % len(COLOURS)] for i, c in enumerate(curves)}
    for c in curves:
        parts += _curve(c, colours[c.name], x_at, y_at, width=3.5 if c.name == emphasis else 1.6)
    ends = [(c.name, *c.points[-1], colours[c.name]) for c in curves]
    ends += [(name, max(xs), value, GREY) for name, value in levels.items()]
    parts += _labels(ends, x_at, y_at)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _axes(xs: Sequence[float], low: float, high: float, x_at: Place, y_at: Place) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0) if (high - low) / s <= 10)
    for k in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = y_at(k * step)
        yield _line([(LEFT, y), (WIDTH - RIGHT, y)], "#eeeeee", 1)
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{k * step:.2f}</text>'
    for x in xs:
        yield _line([(x_at(x), bottom), (x_at(x), bottom + 5)], "#333333", 1)
        yield f'<text x="{x_at(x):.1f}" y="{bottom + 20}" text-anchor="middle">{x:,.0f}</text>'
    yield _line([(LEFT, TOP), (LEFT, bottom), (WIDTH - RIGHT, bottom)], "#333333", 1)
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">questions asked (log)</text>'


def _curve(curve: Curve, colour: str, x_at: Place, y_at: Place, *, width: float) -> Iterator[str]:
    above = [(x_at(x), y_at(high)) for (x, _), (_, high) in zip(curve.points, curve.band, strict=True)]
    below = [(x_at(x), y_at(low)) for (x, _), (low, _) in zip(curve.points, curve.band, strict=True)]
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*above, *reversed(below)])
    yield f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.10"/>'
    line = [(x_at(x), y_at(y)) for x, y in curve.points]
    yield _line(line, colour, width)
    for x, y in line:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 0.8:.1f}" fill="{colour}"/>'


def _labels(ends: Sequence[tuple[str, float, float, str]], x_at: Place, y_at: Place) -> Iterator[str]:
    """Names of lines (name, last x, last y, colour) in the right margin, the best on top, moved apart to be legible.

    A line that ends early is led to the margin by a dotted one.
    """
    floor, margin = TOP - LABEL_GAP, WIDTH - RIGHT
    lowest = HEIGHT - BOTTOM - LABEL_GAP * (len(ends) - 1)
    for i, (name, last, value, colour) in enumerate(sorted(ends, key=lambda e: -e[2])):
        x, y = x_at(last), y_at(value)
        floor = max(min(y, lowest + LABEL_GAP * i), floor + LABEL_GAP)
        if x < margin:
            yield _line([(x, y), (margin, y)], colour, 1, dash="1 4")
        yield _line([(margin + 2, y), (margin + 14, floor)], colour, 1)
        yield f'<text x="{margin + 18}" y="{floor + 4:.1f}" fill="{colour}">{escape(name)} {value:.3f}</text>'


def _line(points: Sequence[tuple[float, float]], colour: str, width: float, *, dash: str = "") -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    extra = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"{extra}/>'
