"""Small charts as SVG text: no library, no request, and colours from the page's own style sheet."""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 12, 38
_RAW_POINTS_SHOWN = 40  # with more, the raw line is faint and a moving mean is drawn over it


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover `low` to `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):  # a constant, up to rounding
        high = low + (abs(low) if abs(low) > 1e-12 else 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def short_number(value: float) -> str:
    """`1.2M`, `250k`, `0.05`: as few characters as a tick label can do with."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.4g}"


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over `width` values, over fewer at the ends."""
    half = width // 2
    return [
        sum(values[max(0, index - half) : index + half + 1]) / len(values[max(0, index - half) : index + half + 1])
        for index in range(len(values))
    ]


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


class _Frame:
    """Axes of a line chart and the mapping of values to pixels."""

    def __init__(self, points: Points, x_label: str):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.x_ticks = nice_ticks(min(xs), max(xs), 4)
        self.y_ticks = nice_ticks(min(ys), max(ys), 4)
        # The curve fills the width; ticks beyond its ends would leave it half empty.
        self.x_low, self.x_high = min(xs), max(max(xs), min(xs) + 1e-9)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]
        self.x_label = x_label

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def svg(self) -> str:
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick end" x="{_LEFT - 7}" y="{y + 3.5:.1f}">{short_number(tick)}</text>')
        for tick in self.x_ticks:
            if self.x_low <= tick <= self.x_high:
                x = self.x(tick)
                parts.append(f'<text class="tick middle" x="{x:.1f}" y="{_HEIGHT - 21}">{short_number(tick)}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(f'<text class="axis middle" x="{middle}" y="{_HEIGHT - 5}">{escape(self.x_label)}</text>')
        return "".join(parts)


def line_chart(points: Points, title: str, x_label: str, colour: str) -> str:
    """A curve with axes. Many points are shown faintly under their moving mean, so that the trend is readable.

    Args:
        points: (x, y), x ascending.
        title (`str`): For screen readers; shown as the tooltip.
        x_label (`str`): What x is.
        colour (`str`): A CSS colour.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    frame = _Frame(points, x_label)
    raw = [(frame.x(x), frame.y(y)) for x, y in points]
    line, faint = raw, ""
    if len(points) > _RAW_POINTS_SHOWN:
        smooth = moving_mean([y for _, y in points], max(3, len(points) // 20))
        line = [(frame.x(x), frame.y(y)) for (x, _), y in zip(points, smooth, strict=True)]
        faint = f'<path class="raw" style="stroke:{colour}" d="{_path(raw)}"/>'
    end_x, end_y = line[-1]
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>{frame.svg()}'
        f'{faint}<path class="line" style="stroke:{colour}" d="{_path(line)}"/>'
        f'<circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="3" style="fill:{colour}"/></svg>'
    )


def path_chart(points: Points, title: str, x_label: str, colour: str) -> str:
    """A curve whose x may turn back, in the order of the points: a dot for each, and the path of their moving mean.

    Args:
        points: (x, y) in the order of training; the first mean is marked hollow and the last full.
        title, x_label, colour: As of `line_chart`.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    frame = _Frame(points, x_label)
    width = max(1, len(points) // 12)
    means = zip(*(moving_mean(values, width) for values in zip(*points, strict=True)), strict=True)
    line = [(frame.x(x), frame.y(y)) for x, y in means]
    dots = "".join(
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="1.6" style="fill:{colour};opacity:.35"/>'
        for x, y in points
    )
    (start_x, start_y), (end_x, end_y) = line[0], line[-1]
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>{frame.svg()}'
        f'{dots}<path class="line" style="stroke:{colour}" d="{_path(line)}"/>'
        f'<circle cx="{start_x:.1f}" cy="{start_y:.1f}" r="3" style="fill:none;stroke:{colour}"/>'
        f'<circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="3" style="fill:{colour}"/></svg>'
    )


def interval_mark(
    value: float,
    interval: Sequence[float] | None,
    before: float | None,
    before_interval: Sequence[float] | None,
    scale: tuple[float, float],
    chance: float | None = None,
) -> str:
    """Before (hollow) and after (full) on one line, their 95% intervals as bars, and chance as a dotted mark."""
    width, height, margin = 200.0, 26.0, 7.0
    low, high = scale

    def x(number: float) -> float:
        share = min(1.0, max(0.0, (number - low) / (high - low)))
        return margin + share * (width - 2 * margin)

    def mark(number: float, ends: Sequence[float] | None, kind: str) -> str:
        bar = ""
        if ends and None not in ends:
            bar = f'<line class="whisker {kind}" x1="{x(ends[0]):.1f}" x2="{x(ends[1]):.1f}" y1="13" y2="13"/>'
        return f'{bar}<circle class="dot {kind}" cx="{x(number):.1f}" cy="13" r="4.5"/>'

    parts = [f'<line class="track" x1="{margin}" x2="{width - margin}" y1="13" y2="13"/>']
    if chance is not None:
        parts.append(f'<line class="chance" x1="{x(chance):.1f}" x2="{x(chance):.1f}" y1="4" y2="22"/>')
    if before is not None:
        parts.append(mark(before, before_interval, "before"))
    parts.append(mark(value, interval, "after"))
    return f'<svg class="mark" viewBox="0 0 {width:g} {height:g}" aria-hidden="true">{"".join(parts)}</svg>'


def histogram(counts: Sequence[tuple[str, float]], x_label: str, colour: str) -> str:
    """Bars with their labels below; every bar carries its count as a tooltip."""
    if not counts:
        return ""
    top = nice_ticks(0, max(value for _, value in counts), 3)
    plot, base = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    slot = plot / len(counts)
    every = max(1, math.ceil(len(counts) / 12))
    parts = []
    for tick in top:
        y = base - tick / top[-1] * (base - _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 7}" y="{y + 3.5:.1f}">{short_number(tick)}</text>')
    for index, (label, value) in enumerate(counts):
        tall = value / top[-1] * (base - _TOP)
        left = _LEFT + index * slot
        parts.append(
            f'<rect x="{left + slot * 0.12:.1f}" y="{base - tall:.1f}" width="{slot * 0.76:.1f}" height="{tall:.1f}" '
            f'rx="1.5" style="fill:{colour}"><title>{escape(label)}: {value:g}</title></rect>'
        )
        if index % every == 0:
            x = left + slot / 2
            parts.append(f'<text class="tick middle" x="{x:.1f}" y="{_HEIGHT - 21}">{escape(label)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis middle" x="{middle}" y="{_HEIGHT - 5}">{escape(x_label)}</text>')
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def bars(values: Sequence[tuple[str, float, str]], digits: int = 2) -> str:
    """Horizontal bars: (label, value, CSS colour), all from zero on one scale."""
    if not values:
        return ""
    label_width, bar_width, row = 118, 190, 27
    longest = max(value for _, value, _ in values) or 1.0
    parts = []
    for index, (label, value, colour) in enumerate(values):
        y = index * row
        wide = value / longest * bar_width
        parts.append(
            f'<text class="bar-label end" x="{label_width - 8}" y="{y + 17}">{escape(label)}</text>'
            f'<rect x="{label_width}" y="{y + 5}" width="{wide:.1f}" height="16" rx="2" style="fill:{colour}"/>'
            f'<text class="bar-value" x="{label_width + wide + 7:.1f}" y="{y + 17}">{value:.{digits}f}</text>'
        )
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {len(values) * row}" role="img">{"".join(parts)}</svg>'
