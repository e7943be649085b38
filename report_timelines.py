"""A video's timeline and a segment's card in the report: faces above, label against prediction below."""

import numpy as np

from charts import frame_axis, strip_row, values_row
from metrics import CCC
from page import element, faces as face_row, percent, shown, text
from report_examples import Example, Faces, Segment, in_words

FACES, FEW_FACES = 8, 4          # above a timeline, in a card


def row(name: str, *parts: str, cls: str = "row") -> str:
    """A line of a timeline: its name, and what fills the rest of the width."""
    return element("div", element("div", text(name), cls="name"), *parts, cls=cls)


def timeline(why: str, examples: list[Example], faces: Faces) -> str:
    """One video for all its tasks."""
    name, T = examples[0].name, max(len(example.values) for example in examples)
    own = " · ".join(f"{example.task.name} {shown(example.score)} in {example.labelled:,} labelled frames"
                     for example in examples)
    parts = [element("h3", text(f"{name}, the {why} video" if why != "chosen" else name)),
             element("div", text(f"its own score: {own}"), cls="soft"),
             row("frames", face_row(faces.between(name, 0, T, FACES)))]
    for example in examples:
        parts += values(example, T) if example.task.metric is CCC else strips(example, T)
        parts.append(row("frame", frame_axis(T), cls="row scale"))
    return element("article", *parts)


def longer(array, T: int) -> np.ndarray:
    """To T frames, so that the tasks of a video stand below each other; NaN after the last."""
    filled = np.full((T, *array.shape[1:]), np.nan)
    filled[:len(array)] = array
    return filled


def values(example: Example, T: int) -> list[str]:
    """A row with two curves for each of valence and arousal."""
    task, rows = example.task, []
    labels, outputs = longer(example.labels, T), longer(example.values, T)
    for k, name in enumerate(task.outputs):
        ends = element("div", element("span", text(f"{task.highest}")), element("b", text(name)),
                       element("span", text(f"{task.lowest}".replace("-", "−"))), cls="ends")
        drawn = values_row(f"{name} of {example.name}: label and prediction", labels[:, k], outputs[:, k],
                           task.lowest, task.highest)
        rows.append(element("div", ends, drawn, cls="row"))
    return rows


def strips(example: Example, T: int) -> list[str]:
    """A row for each expression or action unit: the label above the line, the prediction below it. Of the
    expressions the one with the largest probability; of an action unit its probability."""
    task, names, rows = example.task, example.task.outputs, []
    labels, values = longer(example.labels, T), longer(example.values, T)
    if task.one_class:
        known, classes = ~np.isnan(labels), np.arange(len(names))
        decided = np.where(np.isnan(values[:, :1]), np.nan, values.argmax(axis=1)[:, None] == classes)
        labels = np.where(known[:, None], labels[:, None] == classes, np.nan)                 # (T,) -> (T, K)
        values = decided
    for k, name in enumerate(names):
        known = ~np.isnan(labels[:, k])
        labelled = percent(labels[known, k].mean()) if known.any() else "none"
        told = percent((values[:len(example.values), k] > 0.5).mean())
        title = f"{name} of {example.name}: labelled in {labelled} of the frames, predicted in {told}"
        rows.append(row(name, strip_row(title, labels[:, k], values[:, k], half=not task.one_class)))
    return rows


def legend() -> str:
    """How label, prediction and what nobody annotated look."""
    def sample(*marks):
        return element("svg", *marks, width=34, height=16, viewBox="0 0 34 16", aria_hidden="true")
    entries = [
        (sample(element("path", d="M1 8H33", cls="label-line")), "label (thick)"),
        (sample(element("path", d="M1 8H33", cls="line")), "prediction (thin)"),
        (sample(element("rect", x=1, y=1, width=32, height=7, cls="label-area")), "label (above the line)"),
        (sample(element("rect", x=1, y=8, width=32, height=7, cls="prediction-area")),
         "prediction (below the line; of action units its probability, dotted at 0.5)"),
        (sample(element("rect", x=1, y=1, width=32, height=7, cls="unknown")), "not annotated")]
    return element("div", *(element("span", drawn, text(words)) for drawn, words in entries), cls="legend")


def segment_card(segment: Segment, faces: Faces) -> str:
    """One of the worst segments: its frames, and what was said of them."""
    task = segment.example.task
    kind = "root mean squared error" if task.metric is CCC else "of its labels wrong"
    error = f"{segment.error:.3f}" if task.metric is CCC else percent(segment.error)
    name = segment.example.name
    return element(
        "div", face_row(faces.between(name, segment.start, segment.end, FEW_FACES)),
        element("div", element("strong", text(name)),
                text(f", frames {segment.start + 1:,} to {segment.end:,}")),
        element("div", text(f"{error} {kind}"), cls="soft"),
        *(element("div", text(words)) for words in in_words(segment)), cls="card")
