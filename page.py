"""One HTML page in one file: elements with everything escaped, tables, pictures, and the style of the page.

A text that comes from outside, such as the name of a video, is only ever passed as an attribute or through
`text`, so it cannot become markup. The page loads nothing: pictures are data in it, and there is no script.

    python page.py example.html      # a page with one of each
"""

import base64
import html
import io
import math
import re
import sys

from PIL import Image

from checkpoints import write_text

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #565d66;
        --rule: #d9dce0; --label: #d55e00; --prediction: #0072b2; --chance: #1d2126; --unknown: #d3d5d8;
        --cell: #0072b2; }
@media (prefers-color-scheme: dark) {
    :root { --page: #14171a; --card: #1c2024; --ink: #e8eaed; --soft: #a4acb6; --rule: #3a4047;
            --label: #e69f00; --prediction: #56b4e9; --chance: #e8eaed; --unknown: #4a5058; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--page);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 3rem 0 .5rem; padding-top: .6rem; border-top: 2px solid var(--ink); font-size: 1.3rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.05rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0 1.4rem; font-size: .9rem; }
a { color: var(--prediction); }
figure { margin: 0; min-width: 0; }
svg { display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.soft { fill: var(--soft); font-size: 11px; }
svg text.count { fill: var(--ink); font-size: 11px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0; font-size: .9rem; font-variant-numeric: tabular-nums;
        overflow-wrap: normal; }
th, td { padding: .22rem .7rem .22rem 0; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tr.last td { font-weight: 600; border-bottom: 0; }
.tiles, .grid { display: grid; gap: 1rem 1.5rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.pair > .wide { max-width: 100%; }
.pair > figure { flex: 1 1 18rem; max-width: 30rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; }
.grid .card { font-size: .875rem; line-height: 1.45; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.chart { width: 100%; height: auto; }
.whole { width: auto; max-width: none; }
.axis { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--prediction); stroke-width: 1.8; stroke-linejoin: round; }
.dot { fill: var(--prediction); }
.bar { fill: var(--prediction); fill-opacity: .5; }
.whisker { stroke: var(--ink); stroke-width: 1.4; }
.chance { fill: var(--card); stroke: var(--chance); stroke-width: 1.4; }
.level { stroke: var(--chance); stroke-width: 1.2; stroke-dasharray: 5 4; }
.cell { fill: var(--cell); }
.frame { fill: none; stroke: var(--rule); }
.row { display: grid; grid-template-columns: 5.2rem minmax(0, 1fr); gap: 0 .6rem; align-items: center; }
.row > .name { font-size: .8rem; line-height: 1.2; text-align: right; }
.row.scale { align-items: end; margin-bottom: .5rem; }
.row > .ends { display: flex; flex-direction: column; justify-content: space-between; height: 96px;
               font-size: .75rem; line-height: 1; text-align: right; color: var(--soft); }
.row > .ends b { color: var(--ink); font-weight: 500; font-size: .8rem; }
.strip { width: 100%; height: 24px; border-bottom: 1px solid var(--rule); }
.values { width: 100%; height: 96px; border: 1px solid var(--rule); margin: 5px 0; }
.ticks { width: 100%; height: 22px; }
.values path, .strip line { vector-effect: non-scaling-stroke; }
.label-line { fill: none; stroke: var(--label); stroke-width: 3.2; stroke-opacity: .75; }
.label-area { fill: var(--label); }
.prediction-area { fill: var(--prediction); }
.unknown { fill: var(--unknown); }
.half { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.faces { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 2px; }
.faces figure { text-align: center; }
.faces img { display: block; margin: 0 auto; width: 100%; height: auto; max-width: 84px; border-radius: 3px; }
.faces figcaption { font-size: .7rem; line-height: 1.3; }
article > .soft { margin-bottom: .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .5rem 0; font-size: .85rem; }
.legend svg { display: inline-block; vertical-align: -3px; margin-right: .4rem; }
.sheet { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--rule); }
details { margin: .5rem 0; }
summary { cursor: pointer; }
pre { margin: .5rem 0; padding: .7rem .9rem; overflow-x: auto; background: var(--card); overflow-wrap: normal;
      border: 1px solid var(--rule); border-radius: 8px; font: 12.5px/1.45 ui-monospace, monospace; }
@media (max-width: 40rem) {
    table { font-size: .8rem; } th, td { padding-right: .45rem; }
    .row { grid-template-columns: 4.2rem minmax(0, 1fr); } h1 { font-size: 1.4rem; } }
@media print {
    :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb;
            --label: #d55e00; --prediction: #0072b2; --chance: #000; --unknown: #d3d5d8; }
    * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
    body { max-width: none; padding: 0; font-size: 11pt; }
    nav { display: none; }
    h2, h2 + p, h3, h3 + p, .legend { break-after: avoid-page; }
    .strip { height: 18px; }
    .values, .row > .ends { height: 72px; }
    .card, .chart, .pair, .legend, tr, article, .sheet { break-inside: avoid; }
    .grid { grid-template-columns: repeat(3, 1fr); }
    details:not([open]) { display: none; }
    pre { white-space: pre-wrap; } }
"""


# ---- Elements

def text(value) -> str:
    """A text as markup: what it holds of <, >, & and quotes is shown, never obeyed."""
    plain = [c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value)]
    return html.escape("".join(plain))


def number(value: float) -> str:
    """A coordinate: at most two decimals, no trailing zeros."""
    words = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if words == "-0" else words


def element(name: str, /, *children: str, **attributes) -> str:
    """<name ...>children</name>. Children are markup. `cls` is the attribute class; an underscore in a name
    stands for a hyphen."""
    words = [name]
    for key, value in attributes.items():
        key = "class" if key == "cls" else key.replace("_", "-")
        words.append(f'{key}="{number(value) if isinstance(value, float) else text(value)}"')
    if name in ("img", "meta"):                                    # those that hold nothing
        return f"<{' '.join(words)}>"
    return f"<{' '.join(words)}>{''.join(children)}</{name}>"


def paragraph(words: str, cls: str = "") -> str:
    """Words as a paragraph, of a class of the CSS."""
    return element("p", text(words), **({"cls": cls} if cls else {}))


def table(header, rows, last: bool = False, words: bool = False) -> str:
    """Rows of texts below a header. `last`: the last row is a sum or a mean, and set apart. `words`: there is
    no column of numbers, so all begin at the left."""
    head = element("tr", *(element("th", text(cell), scope="col") for cell in header))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(element("td", text(cell)) for cell in row)
        body.append(element("tr", cells, **({"cls": "last"} if last and i == len(rows) - 1 else {})))
    cls = "words" if words else "numbers"
    whole = element("table", element("thead", head), element("tbody", *body), cls=cls)
    return element("div", whole, cls="wide")


def details(summary: str, *children: str) -> str:
    """Shown when the reader opens it."""
    return element("details", element("summary", text(summary)), *children)


def preformatted(words: str) -> str:
    """Words whose lines and spaces stay as they are."""
    return element("pre", text(words))


# ---- Pictures

def data_url(data: bytes, kind: str) -> str:
    """An image file as an address that holds it, so that the page loads nothing. kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def face(pixels, alt: str, size: int = 96) -> str:
    """A thumbnail, as JPEG of 2 to 4 KB. pixels: uint8 (h, w, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(file, "JPEG", quality=75)
    return element("img", src=data_url(file.getvalue(), "jpeg"), alt=alt, width=size, height=size)


def faces(pictures) -> str:
    """A row of thumbnails of equal width, with the frames' numbers. pictures: (number, pixels or None)."""
    cells = []
    for count, pixels in pictures:
        inside = face(pixels, f"frame {count}") if pixels is not None else text("no face")
        cells.append(element("figure", inside, element("figcaption", f"{count}")))
    return element("div", *cells, cls="faces")


# ---- The page

def page(title: str, *body: str) -> str:
    """The whole file."""
    head = element("head", element("meta", charset="utf-8"),
                   element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                   element("title", text(title)), element("style", STYLE))
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *body), lang='en')}\n"


def section(name: str, title: str, *children: str) -> str:
    """A part of the page with a heading that can be linked to."""
    return element("section", element("h2", text(title)), *children, id=name)


def headings(markup: str) -> list[tuple[str, str]]:
    """(name, title as markup) of each `section`."""
    return re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', markup)


def shown(value) -> str:
    """A value as the report shows it: three decimals, whole numbers with commas, yes or no, text as it is; a
    dash where there is none."""
    if isinstance(value, (bool, str)):
        return value if isinstance(value, str) else "yes" if value else "no"
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def percent(share: float) -> str:
    """0.734 -> "73 %"; a dash where there is no number."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else "–"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the file to write: python page.py example.html")
    write_text(sys.argv[1], page("Example", element("h1", "Example"), section(
        "table", "A table", table(["class", "F1"], [["Neutral", shown(0.81234)], ["mean", shown(0.8)]], True),
        details("What is it?", preformatted("<script> stays text")))))
