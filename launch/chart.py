"""Line charts as SVG for pages without scripts: colours come from CSS, light and dark, and a point tells its value when
the pointer rests on it."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from data_pipeline.html_page import short

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 42  # margins around the axes
POINTS = 150  # most points of a line; a longer line is drawn as means, with a band from the lowest to the highest value
COLOURS = 6
BOX = f"{LEFT} 0 {WIDTH - LEFT} {HEIGHT - BOTTOM + 3}"
# Cuts off what leaves it.
INSIDE = '<svg x="{}" y="{}" width="{}" height="{}" '.format(*BOX.split()) + f'viewBox="{BOX}">'
STYLE = """
:root { --c0: #2b6cb0; --c1: #c05621; --c2: #2f855a; --c3: #97266d; --c4: #6b5b00; --c5: #4c51bf; --mark: #c53030 }
@media (prefers-color-scheme: dark) { :root { --c0: #63a4e0; --c1: #f0965a; --c2: #68c18c; --c3: #e07ab5; --c4: #d6bf4a;
  --c5: #a3a7f5; --mark: #fc8181 } }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem 1.5rem;
  margin: .8rem 0 }
figure { margin: 0; min-width: 0 } figcaption { font-weight: 600 } figcaption small { font-weight: 400 }
.keyed { display: inline-block; max-width: 100% }
.key { display: inline-block; width: 1.1em; height: .22em; margin: 0 .3em .2em .8em; vertical-align: middle }
svg.chart { width: 100%; height: auto } svg.chart text { font-size: 12px } svg .grid { stroke: var(--line) }
.d1 { stroke-dasharray: 6 3 } .d2 { stroke-dasharray: 2 3 }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round } svg .spread { stroke: none; opacity: .22 }
svg .mark { stroke: var(--mark); stroke-dasharray: 4 3 } svg .mark.rewind { stroke-dasharray: 1 3; stroke-width: 2 }
svg .level { stroke: var(--text); stroke-dasharray: 8 4 } svg .hit { fill: transparent }
svg .hit:hover { fill: var(--text) } .wrong { color: var(--mark) }
svg.bar { width: 100%; height: 24px }
""" + "".join(f".s{n} {{ stroke: var(--c{n}); background: var(--c{n}); fill: var(--c{n}) }}\n" for n in range(COLOURS))


class Line(NamedTuple):
    """label: "" in a chart of one line. x, y [N]; NaN in y is a gap. low, high [N]: a band around the line. dots: each
    point is drawn as well, as where they are few."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False


class Mark(NamedTuple):
    """A vertical line at x. kind: "restart" or "rewind". text: shown when the pointer rests on it."""

    x: float
    kind: str
    text: str


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    level: tuple[float, str] | None = None,
    until: float = 0.0,
    log: bool = False,
    zero: bool = False,
    settled: bool = False,
) -> str:
    """An HTML figure; "" where no line has a finite value.

    level: a horizontal line at this y, and what it is. until: x goes from 0 at least so far. log: logarithmic y.
    zero: y begins at 0. settled: the first tenth of a line does not widen the range of y, so that a start far above
    does not flatten the rest.
    """
    lines = [thinned(line) for line in lines]
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    last = max(until, *(float(line.x.max()) for line in lines))
    ys = np.concatenate([_range(line, settled) for line in lines])
    ys = ys[np.isfinite(ys) & (ys > 0)] if log else ys[np.isfinite(ys)]
    if not len(ys):
        return ""
    x = _Axis(0.0, last, LEFT, WIDTH - RIGHT)
    lowest, highest = float(ys.min()), float(max(ys.max(), level[0] if level else ys.max()))
    y = _Axis(0.0 if zero else lowest, highest, HEIGHT - BOTTOM, TOP, log=log, padded=True)
    shapes = [*_grid(x, y, x_label, y_label), *(_mark(mark, x) for mark in marks), INSIDE]
    for number, line in enumerate(lines):
        shapes += _drawn(line._replace(label=line.label or title), _look(number), x, y, x_label)
    shapes.append("</svg>")
    if level:
        at = y(level[0])
        shapes.append(f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        shapes.append(f'<text x="{WIDTH - RIGHT}" y="{at - 4:.1f}" text-anchor="end">{escape(level[1])}</text>')
    keys = "".join(
        f'<span class="keyed"><span class="key {_look(number)}"></span>{escape(line.label)}</span>'
        for number, line in enumerate(lines)
        if line.label
    )
    caption = escape(title) + (f" <small>{keys}</small>" if keys else "")
    return (
        f'<figure><figcaption>{caption}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {y_label} by {x_label}")}">{"".join(shapes)}</svg></figure>'
    )


def thinned(line: Line) -> Line:
    """At most POINTS means of consecutive values, within the band of what they stand for."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    low, high = (y if side is None else np.asarray(side, float) for side in (line.low, line.high))
    width = 1 if line.dots else -(-len(y) // POINTS)
    if width > 1:
        starts = range(0, len(y), width)
        x, y, low, high = (
            np.array([reduce(values[start : start + width]) for start in starts])
            for values, reduce in ((x, np.mean), (y, _mean), (low, _least), (high, _most))
        )
    return line._replace(x=x, y=y, low=low, high=high)


def _mean(values: np.ndarray) -> float:
    found = values[np.isfinite(values)]
    return float(found.mean()) if len(found) else math.nan


def _least(values: np.ndarray) -> float:
    return float(np.fmin.reduce(values))


def _most(values: np.ndarray) -> float:
    return float(np.fmax.reduce(values))


def _range(line: Line, settled: bool) -> np.ndarray:
    """The values that the range of y must hold."""
    skipped = len(line.y) // 10 if settled and not line.dots else 0
    return np.concatenate([line.y[skipped:], line.low[skipped:], line.high[skipped:]])


class _Axis:
    """Values from `low` to `high` -> places from `first` to `last` in the drawing."""

    def __init__(self, low: float, high: float, first: float, last: float, *, log: bool = False, padded: bool = False):
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        room = 0.05 * (high - low) if padded else 0.0
        if high == low:
            room = abs(high) * 0.1 or 1.0
        self.low, self.high = low - room * (low != 0 or log), high + room
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """About five: multiples of 1, 2 or 5 times a power of ten; on a long logarithmic axis powers of ten alone."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1) if self.log else ()
        if self.log and self.high - self.low >= 3:
            found = [10.0**power for power in decades[:: -(-len(decades) // 6)]]
        elif self.log and self.high - self.low >= 1:
            found = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
        else:
            low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
            rough = (high - low) / 5
            base = 10 ** math.floor(math.log10(rough))
            step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough)
            return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [tick for tick in found if self.low <= math.log10(tick) <= self.high]


def _grid(x: _Axis, y: _Axis, x_label: str, y_label: str) -> list[str]:
    floor = HEIGHT - BOTTOM
    shapes = [f'<path class="grid" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>']
    for tick in y.ticks():
        at = y(tick)
        shapes.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        shapes.append(f'<text class="soft" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_figure(tick)}</text>')
    for tick in x.ticks():
        at = x(tick)
        shapes.append(f'<path class="grid" d="M{at:.1f} {floor}v4"/>')
        shapes.append(f'<text class="soft" x="{at:.1f}" y="{floor + 17}" text-anchor="middle">{_figure(tick)}</text>')
    middle, across = (LEFT + WIDTH - RIGHT) / 2, floor / 2
    shapes.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(13 {across}) rotate(-90)" text-anchor="middle"'
    return [*shapes, f"<text {turned}>{escape(y_label)}</text>"]


def _mark(mark: Mark, x: _Axis) -> str:
    d = f"M{x(mark.x):.1f} {TOP}V{HEIGHT - BOTTOM}"
    return f'<path class="mark {mark.kind}" d="{d}"><title>{escape(mark.text)}</title></path>'


def _look(number: int) -> str:
    """CSS classes: of a colour, and of dashes where the colours have all been used."""
    return f"s{number % COLOURS} d{number // COLOURS}"


def _drawn(line: Line, look: str, x: _Axis, y: _Axis, x_label: str) -> list[str]:
    places = [(x(a), y(b)) if math.isfinite(b) else None for a, b in zip(line.x, line.y, strict=True)]
    shapes = []
    if not line.dots:
        edges = [
            (x(a), y(low), y(high))
            for a, low, high in zip(line.x, line.low, line.high, strict=True)
            if math.isfinite(low) and math.isfinite(high)
        ]
        if any(low != high for _, low, high in edges):
            around = [(a, high) for a, _, high in edges] + [(a, low) for a, low, _ in reversed(edges)]
            shapes.append(f'<path class="spread {look}" d="{_path(around)}Z"/>')
    shapes.append(f'<path class="line {look}" d="{_path(places)}"/>')
    for place, a, b in zip(places, line.x, line.y, strict=True):
        if place and place[1] >= 0:
            told = f"<title>{escape(line.label)} {b:,.4g}, {escape(x_label)} {_figure(a)}</title>"
            at = f'cx="{place[0]:.1f}" cy="{place[1]:.1f}"'
            shapes.append(f'<circle class="{look}" {at} r="2.5"/>' if line.dots else "")
            shapes.append(f'<circle class="hit" {at} r="5">{told}</circle>')
    return shapes


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """The SVG path through these places; None is a gap."""
    words, pen = [], "M"
    for place in places:
        if place is not None:
            words.append(f"{pen}{place[0]:.1f} {place[1]:.1f}")
        pen = "M" if place is None else "L"
    return "".join(words)


def _figure(value: float) -> str:
    return short(value).strip() if abs(value) >= 1000 else f"{value:.4g}"
