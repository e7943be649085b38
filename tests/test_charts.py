"""The charts: where each mark stands, computed by hand; and that nothing breaks on nothing."""

import math
import re
import xml.etree.ElementTree as etree

import numpy as np
import pytest

from charts import (MOST_BINS, area_path, bars, binned, curve, frame_axis, level_path, matrix, runs,
                    strip_row, ticks, values_row)

NAN = math.nan


def marks(svg: str, tag: str, cls: str = "") -> list[dict]:
    """The attributes of all elements of a tag and class; the chart must be well-formed and have a title."""
    tree = etree.fromstring(svg)
    assert tree.get("role") == "img" and tree[0].tag == "title" and tree[0].text == tree.get("aria-label")
    return [{**mark.attrib, "text": mark.text} for mark in tree.iter(tag) if mark.get("class", "") == cls]


def numbers(path: str) -> list[float]:
    return [float(word) for word in re.findall(r"-?[\d.]+", path)]


# ---- Axes

@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.5, 1]), (0, 0.4, [0, 0.1, 0.2, 0.3, 0.4]), (1, 30, [10, 20, 30]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0, 0.0015, [0, 0.0005, 0.001, 0.0015]), (0, 47_000, [0, 10_000, 20_000, 30_000, 40_000]),
    (0, 0, []), (1, 0, []), (NAN, 1, []), (0, math.inf, [])])
def test_ticks_are_round_numbers_within_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_axis_are_few_evenly_spaced_and_inside():
    rng = np.random.default_rng(0)
    for low, size in zip(rng.uniform(-1e3, 1e3, 300), 10 ** rng.uniform(-4, 7, 300)):
        found = ticks(low, low + size)
        assert 1 <= len(found) <= 5
        assert min(found) >= low - 1e-6 * size and max(found) <= low + size * (1 + 1e-6)
        if len(found) > 2:
            assert np.ptp(np.diff(found)) < 1e-6 * size
        step = np.diff(found)[0] if len(found) > 1 else abs(found[0]) or 1
        assert len(found) == 1 or f"{step:e}"[0] in "125"


def test_runs_are_the_stretches_that_are_true():
    assert runs([True, True, False, True]) == [(0, 2), (3, 4)]
    assert runs([]) == runs([False]) == [] and runs([True]) == [(0, 1)]


# ---- Charts of their own size

def test_a_curve_passes_through_its_points():
    svg = curve("loss", [1, 2, 3], [2.0, 1.0, 0.0], "nats", chance=1.0)
    (path,) = marks(svg, "path", "line")                      # x from 52 to 310, y from 150 (0) to 26 (2)
    assert numbers(path["d"]) == [52, 26, 181, 88, 310, 150]
    (level,) = marks(svg, "line", "level")
    assert level["y1"] == level["y2"] == "88"
    assert marks(svg, "text")[0]["text"] == "loss, nats"


def test_the_axis_of_a_curve_holds_0_chance_and_negative_values():
    (path,) = marks(curve("score", [1, 2], [-1.0, 0.5], chance=1.0), "path", "line")
    assert numbers(path["d"]) == [52, 150, 310, 57]           # -1 is at 150, 1 at 26: 0.5 at 3/4 of the way


def test_a_gap_in_a_curve_stays_empty_and_a_lone_value_is_a_dot():
    svg = curve("x", [1, 2, 3, 4, 5], [1, NAN, 1, 1, NAN])
    assert len(marks(svg, "path", "line")) == 1
    (dot,) = marks(svg, "circle", "dot")
    assert (dot["cx"], dot["cy"]) == ("52", "26")


@pytest.mark.parametrize("values", [[], [NAN, NAN], [0.0], [5.0], [0.0, 0.0]])
def test_a_curve_of_nothing_one_value_or_zeros_is_drawn(values):
    svg = curve("x", range(1, len(values) + 1), values)
    assert len(marks(svg, "circle", "dot")) == (1 if len(values) == 1 else 0)


def test_bars_begin_at_0_and_carry_interval_chance_and_number():
    svg = bars("F1", [("AU1", 0.5, 0.25, 0.75, 1.0), ("AU2", NAN, NAN, NAN, NAN)])
    (bar,) = marks(svg, "rect", "bar")                 # 0 at x 74, 1 at x 360; the first row's middle at 20
    assert (bar["x"], bar["width"], bar["y"], bar["height"]) == ("74", "143", "13", "14")
    assert [(w["x1"], w["x2"]) for w in marks(svg, "line", "whisker")] == [
        ("145.5", "288.5"), ("145.5", "145.5"), ("288.5", "288.5")]
    (diamond,) = marks(svg, "path", "chance")
    assert numbers(diamond["d"]) == [355, 20, 360, 15, 365, 20, 360, 25]
    assert [mark["text"] for mark in marks(svg, "text")] == ["AU1", "0.500", "AU2", "–"]


def test_a_negative_score_goes_to_the_left_of_0():
    svg = bars("CCC", [("valence", -1.0, NAN, NAN, 0.0)])
    (bar,) = marks(svg, "rect", "bar")                        # -1 at 74, 0 at 217, 1 at 360
    assert (bar["x"], bar["width"]) == ("74", "143")
    svg = bars("difference", [("without a part of it", -0.1, -0.2, -0.1, NAN)], most=0.0)
    (bar,) = marks(svg, "rect", "bar")                        # the name takes 142: -0.2 at 142, 0 at 428
    assert (bar["x"], bar["width"]) == ("285", "143")
    for rows in ([], [("none", NAN, NAN, NAN, NAN)], [("zero", 0.0, 0.0, 0.0, 0.0)]):
        assert "nan" not in bars("nothing", rows, most=0.0) and len(marks(bars("x", rows), "rect")) == 0


def test_a_cell_of_the_matrix_is_as_strong_as_its_share_of_the_row():
    svg = matrix("confusion", [[3, 1, 0], [0, 0, 0], [0, 1000, 1000]], ["Neutral", "Anger", "Disgust"])
    cells = marks(svg, "rect", "cell")
    assert [(cell["x"], cell["y"]) for cell in cells[:4]] == [("76", "44"), ("136", "44"), ("196", "44"),
                                                              ("76", "104")]
    strengths = [cell["fill-opacity"] for cell in cells]
    assert strengths == ["0.56", "0.19", "0", "0", "0", "0", "0", "0.38", "0.38"]
    assert [mark["text"] for mark in marks(svg, "text", "count")] == [
        "3", "75 %", "1", "25 %", "0", "0 %", "0", "–", "0", "–", "0", "–", "0", "0 %", "1,000", "50 %",
        "1,000", "50 %"]


# ---- Rows of a timeline

def test_frames_are_averaged_into_bins_without_those_that_nobody_annotated():
    rng = np.random.default_rng(0)
    for T in (1, 5, 600, 601, 1234, 47_434):
        values = np.where(rng.random(T) < 0.3, NAN, rng.random(T))
        values[:min(T - 1, 100)] = NAN
        found = binned(values)
        assert len(found) == min(T, MOST_BINS)
        if T > MOST_BINS:
            place = np.arange(T) * MOST_BINS // T
            for i in (0, 1, 300, MOST_BINS - 1):
                inside = values[place == i]
                inside = inside[~np.isnan(inside)]
                assert found[i] == pytest.approx(inside.mean() if len(inside) else NAN, nan_ok=True)
    assert len(binned([])) == 0


def test_a_line_runs_through_the_middles_of_frames_and_breaks_at_gaps():
    path = level_path(np.array([1, 0, -1, NAN, 0.5]), -1, 1)
    assert numbers(path) == [0.5, 0, 1.5, 50, 2.5, 100, 4, 25, 5, 25]
    assert level_path(np.array([NAN]), -1, 1) == level_path(np.array([]), -1, 1) == ""
    assert numbers(level_path(np.array([7.0, -7.0]), -1, 1)) == [0.5, 0, 1.5, 100]         # kept in the row


def test_an_area_is_as_high_as_its_value_above_or_below_the_middle_line():
    values = np.array([0, 1, 1, 0.25, 0, NAN, 0.5])
    assert area_path(values, up=True) == "M1 1V0H3V0.75H4V1ZM6 1V0.5H7V1Z"
    assert area_path(values, up=False) == "M1 1V2H3V1.25H4V1ZM6 1V1.5H7V1Z"
    assert area_path(np.zeros(3), up=True) == ""


def test_a_strip_shows_what_nobody_annotated_and_where_the_threshold_is():
    svg = strip_row("AU1", [NAN, NAN, 1, 0], [0.5, 0, 0, 1], half=True)
    (gap,) = marks(svg, "rect", "unknown")
    assert (gap["x"], gap["width"]) == ("0", "2")
    (half,) = marks(svg, "line", "half")
    assert (half["y1"], half["x2"]) == ("1.5", "4")
    assert marks(strip_row("x", [1.0], [1.0], half=False), "line", "half") == []


@pytest.mark.parametrize("T", [1, 2, 47_434])
def test_a_row_of_any_length_is_small_and_well_formed(T):
    rng = np.random.default_rng(0)
    label, output = rng.uniform(-1, 1, T), rng.uniform(-1, 1, T)
    for svg in (values_row("valence", label, output, -1, 1),
                strip_row("AU1", label > 0, abs(output), half=True),
                values_row("none", np.full(T, NAN), output, -1, 1)):
        assert etree.fromstring(svg).get("viewBox").split()[2] == str(min(T, MOST_BINS))
        assert len(svg) < 30_000


def test_the_frame_axis_counts_from_1_and_marks_the_middles_of_frames():
    svg = frame_axis(200)
    assert [mark["text"] for mark in marks(svg, "text", "soft")] == ["1", "50", "100", "150", "200"]
    places = [mark["x1"] for mark in marks(svg, "line", "axis")]
    assert places == ["0.25%", "24.75%", "49.75%", "74.75%", "99.75%"]
    assert [mark["text"] for mark in marks(frame_axis(1), "text", "soft")] == ["1"]
    for T in (2, 3, 47_434):
        assert 1 <= len(marks(frame_axis(T), "text", "soft")) <= 6
