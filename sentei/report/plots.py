"""Small drawings as inline SVG. Colours come from the page's CSS, so that they follow light and dark mode.

Every function returns markup in which all text is escaped. Sizes are in SVG units; the page scales the drawings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

NUM_COLOURS = 8
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve; `colour` indexes the page's palette, a dashed line is drawn with its points."""

    label: str
    colour: int
    points: Sequence[Point]
    dashed: bool = False


def short(content: str, length: int) -> str:
    return content if len(content) <= length else content[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _svg(width: float, height: float, body: list[str], label: str, name: str) -> str:
    return (
        f'<svg class="{name}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(body)}</svg>"
    )


def _text(x: float, y: float, content: str, name: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{name}" text-anchor="{anchor}">{escape(content)}</text>'


# ------------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class Axis:
    """Maps values to positions: `start` and `end` are positions of `low` and `high`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 4 else (1,)
            found = [m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high]
            return found[:: max(1, math.ceil(len(found) / 8))]
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        lowest = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(lowest, math.floor(self.high / step + 1e-9) + 1)]


def _axis(values: list[float], start: float, end: float, log: bool = False, room: float = 0.05) -> Axis:
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** room * 1.02
        return Axis(low / factor, high * factor, start, end, log=True)
    margin = (high - low) * room or abs(high) * 0.05 or 1.0
    return Axis(low - margin, high + margin, start, end)


def _frame(x: Axis, y: Axis, x_label: str, tick_x: Callable[[float], str], tick_y: Callable[[float], str]) -> list[str]:
    body = []
    for value in y.ticks(4):
        body.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        body.append(_text(x.start - 7, y(value) + 4, tick_y(value), "tick", "end"))
    for value in x.ticks(5):
        body.append(_text(x(value), y.start + 18, tick_x(value), "tick", "middle"))
    body.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    body.append(_text(x.end, y.start + 36, x_label, "tick", "end"))
    return body


# ----------------------------------------------------------------------------------------------------------- curves


def curves(lines: Sequence[Line], title: str, x_label: str = "step") -> str:
    """Curves over steps. Many points are averaged in bins; a lone noisy curve shows the bins' range as a band."""
    width, height = 460.0, 230.0
    binned = [(line, _bins(line.points)) for line in lines if line.points]
    values = [mean for _, bins in binned for _, mean, _, _ in bins]
    x = _axis([step for _, bins in binned for step, *_ in bins], 52, width - 12, room=0.0)
    log = min(values) > 0 and max(values) / min(values) > 30
    y = _axis(values, height - 44, 14, log)
    body = _frame(x, y, x_label, _tick, _tick)
    lone = sum(not line.dashed for line, _ in binned) == 1
    for line, bins in binned:
        colour = f"c{line.colour % NUM_COLOURS}"
        clip = [(step, *(min(max(v, y.low), y.high) for v in low_high)) for step, _, *low_high in bins]
        if lone and not line.dashed and any(high > low for _, low, high in clip):
            outline = [(s, high) for s, _, high in clip] + [(s, low) for s, low, _ in reversed(clip)]
            body.append(f'<polygon class="band {colour}" points="{_path(outline, x, y)}"/>')
        path = _path([(step, mean) for step, mean, _, _ in bins], x, y)
        body.append(f'<polyline class="curve {colour}{" dashed" if line.dashed else ""}" points="{path}"/>')
        for step, mean, _, _ in bins if line.dashed or len(bins) == 1 else ():
            body.append(
                f'<circle class="dot {colour}" cx="{x(step):.1f}" cy="{y(mean):.1f}" r="3">'
                f"<title>{escape(f'{line.label}, {x_label} {_tick(step)}: {mean:.4g}')}</title></circle>"
            )
    return _svg(width, height, body, title, "plot")


def _bins(points: Sequence[Point], most: int = 120) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) of at most `most` runs of points."""
    points = sorted(points)
    run = max(1, math.ceil(len(points) / most))
    bins = []
    for start in range(0, len(points), run):
        steps, values = zip(*points[start : start + run], strict=True)
        bins.append((steps[-1] if start else steps[0], sum(values) / len(values), min(values), max(values)))
    return bins


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def _tick(value: float) -> str:
    value = 0.0 if abs(value) < 1e-12 else value
    if abs(value) >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------------- scatter


def scatter(
    points: Sequence[tuple[str, int, float, float]],
    parent: Point | None,
    title: str,
    x_label: str,
    tick_x: Callable[[float], str],
    tick_y: Callable[[float], str],
    show: Callable[[float], str],
    log_y: bool,
) -> str:
    """Quality against size: (label, colour, x, y) of each child, and the dense parent as a ring and a level line."""
    width, height = 460.0, 290.0
    every = [(a, b) for _, _, a, b in points] + ([parent] if parent else [])
    log_y = log_y and min(b for _, b in every) > 0 and max(b for _, b in every) / min(b for _, b in every) > 5
    x = _axis([a for a, _ in every], 60, width - 20, room=0.12)
    y = _axis([b for _, b in every], height - 44, 16, log_y, room=0.12)
    body = _frame(x, y, x_label, tick_x, tick_y)
    if parent:
        level = y(parent[1])
        body.append(f'<line class="level" x1="{x.start}" x2="{x.end}" y1="{level:.1f}" y2="{level:.1f}"/>')
        body.append(
            f'<circle class="ring" cx="{x(parent[0]):.1f}" cy="{level:.1f}" r="5.5">'
            f"<title>{escape(f'dense parent: {show(parent[1])}')}</title></circle>"
        )
    taken = [_box(x(a), y(b) + 4, 12, "middle") for a, b in every]  # no label over a point
    marks = [] if parent is None else [("dense", *parent)]
    for label, colour, a, b in points:
        body.append(
            f'<circle class="dot c{colour % NUM_COLOURS}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="5.5">'
            f"<title>{escape(f'{label}: {show(b)}')}</title></circle>"
        )
        marks.append((short(label, 24), a, b))
    for label, a, b in marks:
        left, top, anchor = _free_place(x(a), y(b), label, taken, x)
        taken.append(_box(left, top, 6.6 * len(label), anchor))
        body.append(_text(left, top, label, "mark", anchor))
    return _svg(width, height, body, title, "plot")


def _free_place(x: float, y: float, label: str, taken: list[Box], axis: Axis) -> tuple[float, float, str]:
    """Where a point's label fits: beside it if it can, then above or below, then further and further down."""
    width = 6.6 * len(label)
    for away in range(0, 120, 6):
        for left, top, anchor in (
            (x + 10, y + 4 + away, "start"),
            (x - 10, y + 4 + away, "end"),
            (x, y - 11 - away, "middle"),
            (x, y + 20 + away, "middle"),
        ):
            box = _box(left, top, width, anchor)
            inside = box[0] >= axis.start - 40 and box[2] <= axis.end + 20 and box[1] > 0
            if inside and not any(_overlap(box, other) for other in taken):
                return left, top, anchor
    return x + 10, y + 4, "start"


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _box(x: float, baseline: float, width: float, anchor: str) -> Box:
    left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
    return left, baseline - 11, left + width, baseline + 3


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --------------------------------------------------------------------------------------------------------- heat map


@dataclass(frozen=True)
class Band:
    """A row of the heat map: for each layer (removed, of, what it says on hover), None where there is no such unit."""

    label: str
    cells: Sequence[tuple[float, float, str] | None]


def heat_map(bands: Sequence[Band], title: str) -> str:
    """Layer (across) x kind (down): the deeper the colour, the more is gone."""
    num_layers = max(len(band.cells) for band in bands)
    left, right, row, top = 92.0, 62.0, 30.0, 22.0
    width = 1040.0
    cell = min(60.0, (width - left - right) / num_layers)
    every = max(1, math.ceil(22 / cell))
    body = [_text(left - 10, 14, "layer", "tick", "end")]
    end = left + cell * num_layers
    body.append(_text(end + right - 4, 14, "all", "tick", "end"))
    for number in range(0, num_layers, every):
        body.append(_text(left + cell * (number + 0.5), 14, str(number), "tick", "middle"))
    for position, band in enumerate(bands):
        y = top + position * row
        body.append(_text(left - 10, y + row / 2 + 3, band.label, "mark", "end"))
        for number, content in enumerate(band.cells):
            if content is None:
                continue
            removed, of, hint = content
            fraction = removed / of
            box = f'x="{left + cell * number + 0.75:.2f}" y="{y}" width="{cell - 1.5:.2f}" height="{row - 3}" rx="2.5"'
            body.append(f'<g><title>{escape(hint)}</title><rect class="cell" {box}/>')
            if fraction:
                body.append(f'<rect class="hot" {box} fill-opacity="{0.12 + 0.88 * fraction:.3f}"/>')
            if fraction and cell >= 22:
                tone = "on" if fraction > 0.5 else "off"
                body.append(
                    _text(left + cell * (number + 0.5), y + row / 2 + 2.5, f"{100 * fraction:.0f}", tone, "middle")
                )
            body.append("</g>")
        present = [content for content in band.cells if content is not None]
        whole = sum(removed for removed, _, _ in present) / sum(of for _, of, _ in present)
        body.append(_text(end + right - 4, y + row / 2 + 3, f"{100 * whole:.1f} %", "mark", "end"))
    return _svg(end + right, top + row * len(bands), body, title, "heat")


def square(matrix: Sequence[Sequence[float]], title: str) -> str:
    """A symmetric heat map of cosines: the deeper the colour, the more alike; 0 and below are blank."""
    count = len(matrix)
    cell = min(24.0, 440.0 / count)
    left = top = 26.0
    every = max(1, math.ceil(22 / cell))
    body = []
    for number in range(0, count, every):
        middle = cell * (number + 0.5)
        body.append(_text(left + middle, top - 8, str(number), "tick", "middle"))
        body.append(_text(left - 6, top + middle + 3, str(number), "tick", "end"))
    for y, line in enumerate(matrix):
        for x, value in enumerate(line):
            box = f'x="{left + cell * x:.2f}" y="{top + cell * y:.2f}" width="{cell:.2f}" height="{cell:.2f}"'
            shade = min(1.0, max(0.0, value))
            hint = escape(f"{y} and {x}: {value:.3f}")
            body.append(f'<g><title>{hint}</title><rect class="cell" {box}/>')
            body.append(f'<rect class="hot" {box} fill-opacity="{shade:.3f}"/></g>')
    return _svg(left + cell * count, top + cell * count, body, title, "square")


# ------------------------------------------------------------------------------------------------------------- bars


def speed_bar(low: float, median: float, high: float, ideal: float | None, least: float, most: float) -> str:
    """A speed-up as a bar that starts at 1, the parent's speed, with its range as a whisker and the ideal as a tick."""
    width, height, middle = 240.0, 24.0, 12.0
    x = Axis(least, most, 3, width - 3)
    left, right = sorted((x(1), x(median)))
    fast = "bar" if median >= 1 else "bar slow"
    body = [
        f'<rect class="{fast}" x="{left:.1f}" y="5" width="{right - left:.1f}" height="14" rx="1.5"/>',
        f'<line class="one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="0" y2="{height}"/>',
        f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}"/>',
        f'<line class="whisker" x1="{x(low):.1f}" x2="{x(low):.1f}" y1="8.5" y2="15.5"/>',
        f'<line class="whisker" x1="{x(high):.1f}" x2="{x(high):.1f}" y1="8.5" y2="15.5"/>',
    ]
    if ideal is not None:
        body.append(f'<line class="ideal" x1="{x(ideal):.1f}" x2="{x(ideal):.1f}" y1="1" y2="23"/>')
    return _svg(width, height, body, f"speed-up {median:.2f}, from {low:.2f} to {high:.2f}", "speed")


def size_bar(layers: float, other: float, whole: float) -> str:
    """Parameters of the layers and of the rest, as parts of the parent's `whole`."""
    width = 240.0
    split, end = width * min(layers / whole, 1), width * min((layers + other) / whole, 1)
    body = [
        f'<rect class="cell" x="0" y="4" width="{width}" height="14" rx="2"/>',
        f'<rect class="bar" x="0" y="4" width="{split:.1f}" height="14" rx="2"/>',
        f'<rect class="rest" x="{split:.1f}" y="4" width="{end - split:.1f}" height="14" rx="2"/>',
    ]
    return _svg(width, 22, body, f"layers {layers / whole:.0%}, embeddings and the rest {other / whole:.0%}", "speed")
