"""The page of a report: nothing that comes from outside becomes markup, every element is closed."""

import base64
import io
import math
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import page
from page import element, face, faces, headings, number, percent, section, shown, table, text

EVIL = "<script>alert('1')</script> & \"quotes\" ' \udcff \x00"


class Reader(HTMLParser):
    """What a browser would make of a page: its tags with attributes, its texts. Raises AssertionError if an
    element is not closed where it must be."""
    EMPTY = ("img", "meta", "!doctype")

    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(markup)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>: {names}"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_text_is_shown_and_never_obeyed():
    for markup in (text(EVIL), element("p", text(EVIL)), element("svg", element("title", text(EVIL)), x=EVIL),
                   table([EVIL], [[EVIL]]), page.paragraph(EVIL), page.preformatted(EVIL),
                   page.details(EVIL, page.paragraph(EVIL)), section("a", EVIL)):
        markup.encode()                                         # no half of a character
        found = Reader(markup)
        assert "script" not in [tag for tag, _ in found.tags]
        assert all("alert('1')</script> & \"quotes\" '" in words for words in found.texts if words.strip())
        assert "\x00" not in markup
    assert Reader(element("p", title=EVIL)).tags == [("p", {"title": EVIL.replace("\udcff", "\ufffd")
                                                            .replace("\x00", "\ufffd")})]


def test_a_whole_page_is_closed_and_finds_its_sections():
    markup = page.page("<b>", section("one", "A & B", table(["x"], [["1"], ["2"]], last=True)),
                       section("two", "C"))
    found = Reader(markup)
    assert markup.startswith("<!DOCTYPE html>") and ("meta", {"charset": "utf-8"}) in found.tags
    assert headings(markup) == [("one", "A &amp; B"), ("two", "C")]
    assert [attributes for tag, attributes in found.tags if tag == "tr"] == [{}, {}, {"class": "last"}]


@pytest.mark.parametrize("value, words", [(0.0, "0"), (-0.001, "0"), (1.5, "1.5"), (100.0, "100"),
                                          (2.346, "2.35"), (-3.0, "-3"), (10.10, "10.1"), (-0.5, "-0.5")])
def test_a_coordinate_has_two_decimals_and_no_trailing_zeros(value, words):
    assert number(value) == words


@pytest.mark.parametrize("value, words", [(0.12345, "0.123"), (0.9999, "1.000"), (-0.1, "-0.100"), (0, "0"),
                                          (1234567, "1,234,567"), (None, "–"), (math.nan, "–"),
                                          (math.inf, "–"), (True, "yes"), ("<b>", "<b>")])
def test_a_number_is_shown_with_three_decimals_or_commas(value, words):
    assert shown(value) == words


def test_a_share_is_shown_in_percent():
    assert [percent(0.734), percent(1), percent(math.nan)] == ["73 %", "100 %", "–"]


def test_a_face_is_a_small_jpeg_in_the_page():
    pixels = np.full((40, 30, 3), (200, 60, 50), np.uint8)
    (tag, attributes), = Reader(face(pixels, "frame 3")).tags
    assert tag == "img" and attributes["alt"] == "frame 3" and len(attributes["src"]) < 4000
    kind, data = attributes["src"].split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and picture.size == (96, 96)
    assert np.abs(np.asarray(picture).astype(int) - (200, 60, 50)).max() < 6
    row = Reader(faces([(1, pixels), (9, None)]))
    assert row.texts == ["1", "no face", "9"]


def test_the_example_is_written(tmp_path, monkeypatch):
    import runpy
    monkeypatch.setattr(sys, "argv", ["page.py", str(tmp_path / "example.html")])
    runpy.run_path(page.__file__, run_name="__main__")
    assert "<script> stays text" in Reader((tmp_path / "example.html").read_text()).texts
