"""Charts as inline SVG that takes its colours from the page: lines over an axis."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
N_COLOURS = 8
# More points than this are not told apart on a chart of this width.
MAX_POINTS = 200

Line = tuple[str, Sequence[tuple[float, float]]]


def line_chart(
    lines: Sequence[Line], colours: dict[str, int], *, x_label: str, log_x: bool = False, share: bool = False
) -> str:
    """Lines as one SVG element; the page's script reads the scales off it to show values.

    Args:
        lines: name and points of each; points that are not finite leave a gap.
        colours: number of the colour by name.
        x_label: below the axis.
        log_x: logarithmic x, base 2, for lengths.
        share: y runs from 0 to 1.
    """
    clean = [
        (name, [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]) for name, points in lines
    ]
    clean = [(name, points) for name, points in clean if points]
    if not clean:
        return '<p class="none">nothing finite was logged</p>'
    xs = [x for _, points in clean for x, _ in points]
    ys = [y for _, points in clean for _, y in points]
    log_y = not share and min(ys) > 0 and max(ys) / min(ys) > 30
    y_low, y_high = (0.0, 1.0) if share else padded(min(ys), max(ys), log_y)
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = (x_low / 2, x_high * 2) if log_x else (x_low - 1, x_high + 1)
    x_scale = Scale(x_low, x_high, LEFT, WIDTH - RIGHT, log_x)
    y_scale = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP + (6 if share else 0), log_y)
    scales = f'data-x="{x_scale.describe()}" data-y="{y_scale.describe()}"'
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {scales}>']
    for value in y_scale.ticks(5):
        y = y_scale(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{tick(value)}</text>'
        )
    for value in sorted(set(xs)) if log_x else x_scale.ticks(5):
        x = x_scale(value)
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}">{tick(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" x="{middle}" y="{HEIGHT - 4}">{escape(x_label)}</text>'
    )
    for name, points in clean:
        points = thinned(points)
        where = " ".join(f"{x_scale(x):.1f},{min(max(y_scale(y), 0), HEIGHT):.1f}" for x, y in points)
        colour = f'style="stroke:var(--c{colours[name] % N_COLOURS})"'
        dash = ' stroke-dasharray="5 3"' if colours[name] >= N_COLOURS else ""
        parts.append(f'<polyline class="line" data-name="{escape(name)}" {colour}{dash} points="{where}"/>')
        if len(points) <= 24:
            parts += [
                f'<circle class="dot" data-name="{escape(name)}" r="2.6" cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" '
                f'style="fill:var(--c{colours[name] % N_COLOURS})"/>'
                for x, y in points
            ]
    parts.append('<g class="hover"></g></svg>')
    return "".join(parts)


class Scale:
    """Maps values onto pixels, linearly or by their logarithm."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool) -> None:
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def describe(self) -> str:
        return f"{self.low:.6g},{self.high:.6g},{self.start:.6g},{self.stop:.6g},{int(self.log)}"

    def ticks(self, count: int) -> list[float]:
        """Round values within the range."""
        if self.log:
            exponents = range(
                math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1
            )
            values = [10.0**exponent for exponent in exponents]
            if len(values) >= 2:
                return values[:: max(1, len(values) // count)]
        rough = (self.high - self.low) / count
        magnitude = 10 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range with some room above and below."""
    if log:
        return low / 1.2, high * 1.2
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 0.3 * high else low - room), high + room


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the mean of each group of neighbours, the last point as it is."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]
    return [*means, points[-1]]


def tick(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
