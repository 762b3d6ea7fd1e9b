"""Figures as inline SVG: a page needs nothing else to show them, in light, in dark and in print.

Drawn by hand rather than by a plotting library, so that colours follow the page's CSS variables, text stays text, and
a figure is a few kilobytes. Colour says the road, the marker's shape says the arm.
"""

import csv
import dataclasses
import io
import math
import urllib.parse
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

WIDTH = 520
"""Units across a figure: narrow, so that its text stays legible when a phone shrinks it."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure with the numbers it shows.

    Attributes:
      title: what it shows, in a few words.
      caption: how to read it.
      svg: the drawing.
      rows: its data, header first.
      legend: (marker, label) per series.
    """

    title: str
    caption: str
    svg: Markup
    rows: tuple[tuple[object, ...], ...]
    legend: tuple[tuple[Markup, str], ...] = ()

    @property
    def data_uri(self) -> str:
        """The data as a CSV file inside a link."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        return "data:text/csv;charset=utf-8," + urllib.parse.quote(text.getvalue())

    @property
    def filename(self) -> str:
        """A name for the downloaded data."""
        words = "".join(c if c.isalnum() else " " for c in self.title.lower()).split()
        return "-".join(words) + ".csv"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A map from data to drawing units.

    Attributes:
      low, high: data at the ends.
      start, end: drawing units there.
      log: whether it is logarithmic.
      root: whether it goes with the square root, that of −x being −√x.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    root: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        if self.root:
            low, high, value = (
                math.copysign(math.sqrt(abs(v)), v) for v in (low, high, value)
            )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers covering [low, high], about `count` of them."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def root_ticks(high: float, count: int = 8) -> list[float]:
    """0 and numbers 1, 2 or 5 times a power of ten up to `high`, on a square-root scale at least 1/count of it apart."""
    power, apart = math.floor(math.log10(high)), math.sqrt(high) / count
    chosen, last = [0.0], math.inf
    for value in (
        m * 10.0**p for p in (power, power - 1, power - 2) for m in (5, 2, 1)
    ):
        if value <= high and apart <= math.sqrt(value) <= last - apart:
            chosen.append(round(value, 10))
            last = math.sqrt(value)
    return sorted(chosen)


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Range of the finite values, a little widened; never empty."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    pad = (high - low) * share or max(abs(high) * 0.1, 0.05)
    return low - pad, high + pad


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number with a true minus sign, and no trailing "-0.00"."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def tick_label(value: float) -> str:
    """The shortest text of a tick."""
    return f"{value:g}".replace("-", "−")


SHAPES = ("circle", "square", "diamond", "triangle", "cross", "down")


def marker(
    shape: str, x: float, y: float, css: str, size: float = 5, tip: str = ""
) -> str:
    """One marker; `tip` shows on hover."""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    s = size
    if shape == "circle":
        body = f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{s:.1f}">'
        return f"{body}{title}</circle>"
    points = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "diamond": [(0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)],
        "triangle": [(0, -1.25 * s), (1.2 * s, s), (-1.2 * s, s)],
        "down": [(0, 1.25 * s), (1.2 * s, -s), (-1.2 * s, -s)],
        "cross": [
            (a * s, b * s)
            for a, b in [
                (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
                (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
            ]
        ],
    }[shape]  # fmt: skip
    where = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points)
    return f'<polygon class="{css}" points="{where}">{title}</polygon>'


def legend_marker(shape: str, css: str) -> Markup:
    """A marker on its own, for a legend in the page's text."""
    drawn = marker(shape, 9, 9, f"{css} dot", 5.5)
    return Markup(
        f'<svg class="key" viewBox="0 0 18 18" width="14" height="14" aria-hidden="true">{drawn}</svg>'
    )


def line(points: Sequence[tuple[float, float]], css: str) -> str:
    """Joined straight lines."""
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{css}" points="{where}"/>'


def text(x: float, y: float, value: str, css: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(value)}</text>'


def svg(height: float, label: str, parts: Iterable[str]) -> Markup:
    """A drawing WIDTH units wide; `label` is what a screen reader says."""
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


@dataclasses.dataclass(frozen=True)
class Series:
    """One arm or scorer in an xy figure.

    Attributes:
      name: as in the legend.
      css: class that sets its colour.
      shape: of its marker.
      lines: (x, y) points of each seed.
      mean: (x, y) points of the mean, or () to draw the seeds only.
      marks: (x, y, tip) of single seeds' points.
      mean_marks: (x, y, tip) of the points that stand for the whole series.
    """

    name: str
    css: str
    shape: str
    lines: tuple[tuple[tuple[float, float], ...], ...] = ()
    mean: tuple[tuple[float, float], ...] = ()
    marks: tuple[tuple[float, float, str], ...] = ()
    mean_marks: tuple[tuple[float, float, str], ...] = ()


def xy(
    label: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    root_x: bool = False,
    x_ticks: Sequence[float] | None = None,
    rules: Sequence[tuple[float, str]] = (),
    height: float = 360,
) -> Markup:
    """Lines and markers over two axes.

    Args:
      label: for screen readers.
      series: Series; later ones are drawn on top.
      x_label, y_label: axis titles with units.
      log_x: whether x is logarithmic; then give x_ticks.
      root_x: whether x goes with its square root.
      x_ticks: where to put ticks; None chooses them.
      rules: (y, name) of horizontal reference lines.
      height: in drawing units.
    """
    points = [
        (x, y)
        for s in series
        for x, y in [
            *[p for one in s.lines for p in one],
            *s.mean,
            *[(x, y) for x, y, _ in s.marks + s.mean_marks],
        ]
        if math.isfinite(x) and math.isfinite(y)
    ]
    left, right, top, bottom = 50, WIDTH - 14, 30, height - 46
    if log_x:
        xs = list(x_ticks or [1, 2])
        x_scale = Scale(min(xs) / 1.1, max(xs) * 1.1, left, right, log=True)
    else:
        low, high = padded((x for x, _ in points), 0.04)
        least = min((x for x, _ in points), default=0.0)
        # A root gives what lies just below 0 more room than it is worth.
        low = 0.0 if least >= 0 else least if root_x else low
        x_scale = Scale(low, high, left, right, root=root_x)
        xs = list(x_ticks or (root_ticks(high) if root_x else ticks(low, high, 6)))
    y_low, y_high = padded([y for _, y in points] + [y for y, _ in rules])
    y_scale = Scale(y_low, y_high, bottom, top)
    parts = []
    for y in ticks(y_low, y_high, 6):
        parts.append(
            f'<line class="gridline" x1="{left}" x2="{right}" y1="{y_scale(y):.1f}" y2="{y_scale(y):.1f}"/>'
        )
        parts.append(text(left - 8, y_scale(y) + 4.5, tick_label(y), "tick", "end"))
    for x in xs:
        parts.append(text(x_scale(x), bottom + 20, tick_label(x), "tick", "middle"))
    parts.append(
        f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    )
    parts.append(text(4, 16, y_label, "label"))
    parts.append(text(right, height - 6, x_label, "label", "end"))
    for y, _ in rules:
        parts.append(
            f'<line class="rule" x1="{left}" x2="{right}" y1="{y_scale(y):.1f}" y2="{y_scale(y):.1f}"/>'
        )

    def place(some: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [
            (x_scale(x), y_scale(y))
            for x, y in some
            if math.isfinite(x) and math.isfinite(y)
        ]

    for s in series:
        for one in s.lines:
            parts.append(line(place(one), f"{s.css} thin"))
        for x, y, tip in s.marks:
            for px, py in place([(x, y)]):
                parts.append(marker(s.shape, px, py, f"{s.css} dot faint", 3.2, tip))
    # Over the seeds' lines, and left of the markers in which curves end.
    for y, name in rules:
        parts.append(text(right - 24, y_scale(y) - 6, name, "note halo", "end"))
    for s in series:
        if s.mean:
            parts.append(line(place(s.mean), f"{s.css} thick"))
    for s in series:
        for x, y, tip in s.mean_marks:
            for px, py in place([(x, y)]):
                parts.append(marker(s.shape, px, py, f"{s.css} dot ring", 6.5, tip))
    return svg(height, label, parts)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a forest figure.

    Attributes:
      name: of the arm or scorer.
      css, shape: how it is marked.
      value: its estimate.
      interval: (low, high), or None.
      seeds: (value, tip) for every seed.
      shown: the estimate as text.
    """

    name: str
    css: str
    shape: str
    value: float
    interval: tuple[float, float] | None
    seeds: tuple[tuple[float, str], ...]
    shown: str


def forest(
    label: str,
    rows: Sequence[Row],
    *,
    x_label: str,
    x_range: tuple[float, float],
    rule: tuple[float, str] | None = None,
) -> Markup:
    """Estimates with intervals and every seed's value, one row each, names above the bars to leave them the width."""
    left, right, row_height, top = 14, WIDTH - 14, 52, 26
    scale = Scale(*x_range, left, right)
    bottom = top + row_height * len(rows) + 4
    parts = []
    for x in ticks(*x_range, 6):
        parts.append(
            f'<line class="gridline" x1="{scale(x):.1f}" x2="{scale(x):.1f}" y1="{top}" y2="{bottom}"/>'
        )
        parts.append(text(scale(x), bottom + 18, tick_label(x), "tick", "middle"))
    if rule is not None:
        x = scale(rule[0])
        parts.append(
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom}"/>'
        )
        share = (x - left) / (right - left)
        anchor = "start" if share < 0.2 else "end" if share > 0.8 else "middle"
        parts.append(text(x, top - 12, rule[1], "note", anchor))
    for i, row in enumerate(rows):
        base = top + row_height * i
        middle = base + 34
        parts.append(text(left, base + 19, row.name, "name halo"))
        parts.append(text(right, base + 19, row.shown, "value halo", "end"))
        for value, tip in row.seeds:
            if math.isfinite(value):
                parts.append(
                    marker(
                        "circle",
                        scale(value),
                        middle + 10,
                        f"{row.css} dot faint",
                        3,
                        tip,
                    )
                )
        if row.interval is not None:
            low, high = (scale(end) for end in row.interval)
            parts.append(
                f'<line class="{row.css} bar" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
            )
        if math.isfinite(row.value):
            parts.append(
                marker(
                    row.shape,
                    scale(row.value),
                    middle,
                    f"{row.css} dot ring",
                    6,
                    row.shown,
                )
            )
    parts.append(text(right, bottom + 40, x_label, "label", "end"))
    return svg(bottom + 48, label, parts)
