"""Charts as SVG text: curves, bars with intervals, a matrix, and the rows of a video's timeline.

Pure functions from numbers to markup; `page.py` has the elements and the colours, which follow the reader's
light or dark mode. No meaning hangs on colour alone: a label is above its line or thick, a prediction below
it or thin; a bar's chance is a diamond, its interval a whisker. Each chart has a title for those who hear it.

In this order: `ticks` · `curve`, `bars` and `matrix`, which have a size of their own · `values_row`,
`strip_row` and `frame_axis`, which fill whatever width they get: their x is a share of the frames.

    python charts.py example.html      # each of them, of invented numbers
"""

import math
import sys

import numpy as np

from checkpoints import write_text
from page import element, number, page, percent, section, shown, text

MOST_BINS = 600                # of a timeline: a long video's frames are averaged


# ---- Axes

def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `most` of them: multiples of 1, 2 or 5 times 10^n."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return []
    n = math.floor(math.log10((high - low) / most))
    steps = (digit * 10.0 ** zeros for zeros in range(n, n + 4) for digit in (1, 2, 5))
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [k * step for k in range(first, last + 1)]


def svg(title: str, *children: str, **attributes) -> str:
    """A chart with a title, which a screen reader tells."""
    return element("svg", element("title", text(title)), *children, role="img", aria_label=title,
                   **attributes)


def write(x, y, words, cls: str = "", anchor: str = "middle") -> str:
    """A text whose baseline is at y."""
    return element("text", text(words), x=x, y=y, text_anchor=anchor, **({"cls": cls} if cls else {}))


def line(x1, y1, x2, y2, cls: str) -> str:
    """A straight line from (x1, y1) to (x2, y2), in pixels."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls)


def runs(known) -> list[tuple[int, int]]:
    """The stretches [start, end) in which a mask (n,) is True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(known, int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def path_of(xs, ys) -> str:
    """The `d` of a path through these points, in pixels."""
    return "M" + "L".join(f"{number(float(x))} {number(float(y))}" for x, y in zip(xs, ys))


# ---- Charts of a size of their own

def curve(title: str, epochs, values, unit: str = "", chance: float = math.nan) -> str:
    """A column of a log over the epochs. values (n,): NaN leaves a gap, a lone value is a dot.

    The y axis begins at 0, or below it if a value does, and holds the dashed chance level.
    """
    epochs, values = np.asarray(epochs, float), np.asarray(values, float)
    left, top, right, bottom = 52.0, 26.0, 310.0, 150.0
    held = np.array([0, chance, *values])
    held = held[np.isfinite(held)]
    low, high = held.min(), held.max()
    high = high if high > low else low + 1
    start, end = (epochs.min(), epochs.max()) if len(epochs) else (0, 1)
    start, end = (start, end) if end > start else (start - 0.5, start + 0.5)

    def x_of(epoch):
        return left + (epoch - start) / (end - start) * (right - left)

    def y_of(value):
        return bottom - (value - low) / (high - low) * (bottom - top)

    marks = [write(left, 14.0, f"{title}, {unit}" if unit else title, anchor="start")]
    for value in ticks(low, high):
        marks += [line(left, y_of(value), right, y_of(value), "axis"),
                  write(left - 6, y_of(value) + 4, f"{value:.4g}", "soft", "end")]
    for epoch in [value for value in ticks(start, end) if value == round(value)]:
        marks += [line(x_of(epoch), bottom, x_of(epoch), bottom + 4, "axis"),
                  write(x_of(epoch), bottom + 16, f"{epoch:.0f}", "soft")]
    marks.append(write((left + right) / 2, bottom + 32, "epoch", "soft"))
    if math.isfinite(chance):
        marks += [line(left, y_of(chance), right, y_of(chance), "level"),
                  write(right, y_of(chance) - 4, "chance", "soft", "end")]
    for a, b in runs(np.isfinite(values)):
        if b - a > 1:
            marks.append(element("path", d=path_of(x_of(epochs[a:b]), y_of(values[a:b])), cls="line"))
        else:
            marks.append(element("circle", cx=float(x_of(epochs[a])), cy=float(y_of(values[a])), r=3,
                                 cls="dot"))
    return svg(f"{title} over {len(epochs)} epochs", *marks, viewBox="0 0 320 188", cls="chart")


def bars(title: str, rows, most: float = 1.0) -> str:
    """Horizontal bars from 0, each with its number, the whisker of its interval and a diamond at chance.

    rows: (name, value, low, high, chance); NaN for what is not known. The axis reaches from the smallest
    number, at most 0, to the largest, at least `most`.
    """
    left = max([74.0, *(6.5 * len(name) + 12 for name, *_ in rows)])         # room for the longest name
    right, top, step = left + 286, 8.0, 24.0
    held = [value for _, *values in rows for value in values if math.isfinite(value)]
    least, most = min([0.0, *held]), max([most, *held])
    most = most if most > least else least + 1

    def x_of(value):
        return left + (value - least) / (most - least) * (right - left)

    bottom = top + step * len(rows)
    marks = []
    for value in ticks(least, most):
        marks += [line(x_of(value), top, x_of(value), bottom, "axis"),
                  write(x_of(value), bottom + 14, f"{value:.2g}", "soft")]
    for i, (name, value, low, high, chance) in enumerate(rows):
        y = top + step * (i + 0.5)                                         # the bar's middle
        marks.append(write(left - 8, y + 4, name, anchor="end"))
        if math.isfinite(value):
            marks.append(element("rect", x=x_of(min(value, 0)), y=y - 7, height=14, cls="bar",
                                 width=abs(x_of(value) - x_of(0))))
        if math.isfinite(low) and math.isfinite(high):
            marks += [line(x_of(low), y, x_of(high), y, "whisker"),
                      line(x_of(low), y - 4, x_of(low), y + 4, "whisker"),
                      line(x_of(high), y - 4, x_of(high), y + 4, "whisker")]
        if math.isfinite(chance):
            x = x_of(chance)
            marks.append(element("path", d=path_of([x - 5, x, x + 5, x], [y, y - 5, y, y + 5]) + "Z",
                                 cls="chance"))
        marks.append(write(right + 44, y + 4, shown(float(value)), anchor="end"))
    return svg(title, *marks, viewBox=f"0 0 {number(right + 50)} {number(bottom + 22)}", cls="chart")


def matrix(title: str, counts, names) -> str:
    """Counts by (label, prediction), each with its share of the row, which is how strong its colour is. It
    does not shrink, because eight columns of numbers could not be read then. Shape: (K, K)."""
    counts = np.asarray(counts, float)
    left, top, side = 76.0, 44.0, 60.0
    K = len(names)
    size = side * K
    marks = [write(left + size / 2, 14.0, "prediction", "soft"),
             write(left - 8, 36.0, "label", "soft", "end")]
    for i, name in enumerate(names):
        middle = side * (i + 0.5)
        marks += [write(left + middle, 36.0, name[:10], "soft"),
                  write(left - 8, top + middle + 4, name[:11], anchor="end")]
        total = counts[i].sum()
        for j in range(K):
            x, y, share = left + side * j, top + side * i, counts[i, j] / total if total else 0.0
            marks.append(element("rect", x=x, y=y, width=side, height=side, cls="cell",
                                 fill_opacity=float(0.75 * share)))
            marks += [write(x + side / 2, y + side / 2 - 2, f"{counts[i, j]:,.0f}", "count"),
                      write(x + side / 2, y + side / 2 + 12, percent(share) if total else "–", "count")]
    marks.append(element("rect", x=left, y=top, width=size, height=size, cls="frame"))
    width, height = number(left + size + 4), number(top + size + 4)
    return svg(title, *marks, viewBox=f"0 0 {width} {height}", width=width, height=height, cls="chart whole")


# ---- Rows of a timeline, as wide as their place

def binned(values, most: int = MOST_BINS) -> np.ndarray:
    """The means of at most `most` equal stretches of frames, NaN left out; a stretch of NaN is NaN.
    Shape: (T,) -> (min(T, most),)"""
    values = np.asarray(values, float)
    if len(values) <= most:
        return values
    place = np.arange(len(values)) * most // len(values)                   # the bin of each frame
    known = np.isfinite(values)
    count = np.bincount(place[known], minlength=most)
    total = np.bincount(place[known], values[known], minlength=most)
    return np.where(count, total / np.maximum(count, 1), np.nan)


def stretched(title: str, bins: int, height: float, *children: str, cls: str) -> str:
    """A row whose x runs from 0 to `bins`, drawn as wide as its place."""
    return svg(title, *children, viewBox=f"0 0 {max(bins, 1)} {number(height)}", preserveAspectRatio="none",
               cls=cls)


def level_path(values, low: float, high: float) -> str:
    """A line through the middles of bins, in a row of height 100. A lone bin is as wide as itself."""
    parts = []
    ys = (high - np.clip(values, low, high)) / (high - low) * 100
    for a, b in runs(np.isfinite(values)):
        xs, shown = (np.arange(a, b) + 0.5, ys[a:b]) if b - a > 1 else ([a, b], ys[[a, a]])
        parts.append(path_of(xs, shown))
    return "".join(parts)


def gaps(labels, height: float) -> str:
    """Grey where nobody annotated."""
    return "".join(element("rect", x=a, y=0, width=b - a, height=height, cls="unknown")
                   for a, b in runs(np.isnan(labels)))


def values_row(title: str, labels, outputs, low: float, high: float) -> str:
    """Label (thick) and prediction (thin) over the frames. Shape: both (T,), NaN = not annotated."""
    labels, outputs = binned(labels), binned(outputs)
    zero = line(0, 50, len(labels), 50, "half") if low == -high else ""
    return stretched(title, len(labels), 100, gaps(labels, 100), zero,
                     element("path", d=level_path(labels, low, high), cls="label-line"),
                     element("path", d=level_path(outputs, low, high), cls="line"), cls="values")


def area_path(values, up: bool) -> str:
    """Steps of heights 0 to 1 from the middle line of a row of height 2, upwards or down."""
    parts, sign = [], -1 if up else 1
    for a, b in runs(np.nan_to_num(values) > 0):
        steps, before = [f"M{a} 1"], None
        for i in range(a, b):
            height = number(1 + sign * float(np.clip(values[i], 0, 1)))
            if height != before:
                steps.append(f"{'H' + str(i) if i > a else ''}V{height}")
            before = height
        parts.append("".join(steps) + f"H{b}V1Z")
    return "".join(parts)


def strip_row(title: str, labels, predicted, half: bool) -> str:
    """The label above the middle line, the prediction below it, each as high as its value from 0 to 1.

    labels (T,): NaN = not annotated. predicted (T,). `half`: a dotted line where the prediction is 0.5.
    """
    labels, predicted = binned(labels), binned(predicted)
    threshold = line(0, 1.5, len(labels), 1.5, "half") if half else ""
    return stretched(title, len(labels), 2, gaps(labels, 1),
                     element("path", d=area_path(labels, True), cls="label-area"),
                     element("path", d=area_path(predicted, False), cls="prediction-area"), threshold,
                     cls="strip")


def frame_axis(T: int) -> str:
    """Numbers of frames below a timeline, counted from 1, at round distances."""
    marks = []
    for frame in sorted({1, *(int(value) for value in ticks(1, T) if value == round(value) and value)}):
        x = f"{number(100 * (frame - 0.5) / T)}%"
        anchor = "start" if frame - 0.5 < 0.02 * T else "end" if frame - 0.5 > 0.98 * T else "middle"
        marks += [line(x, 0, x, 5, "axis"), write(x, 17, f"{frame}", "soft", anchor)]
    return svg(f"frames 1 to {T}", *marks, cls="ticks")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the file to write: python charts.py example.html")
    rng, t = np.random.default_rng(0), np.arange(400)
    label, output = np.sin(t / 40), np.sin(t / 40 + 0.4) * 0.7
    label[100:150] = np.nan
    write_text(sys.argv[1], page("Charts", section(
        "charts", "Charts", curve("loss", range(1, 31), np.exp(-np.arange(30) / 9), "nats", 0.69),
        bars("F1", [("AU1", 0.71, 0.6, 0.8, 0.4), ("AU2", 0.3, 0.2, 0.45, 0.35)]),
        matrix("confusion", rng.integers(0, 90, (3, 3)), ["Neutral", "Anger", "Fear"]),
        values_row("valence", label, output, -1, 1),
        strip_row("AU1", np.where(np.isnan(label), np.nan, label > 0), np.clip(output, 0, 1), half=True),
        frame_axis(400))))
