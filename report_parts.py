"""Sections of the report that come from the files which the stages have written: scores, reconstructed faces,
training curves, settings. `report.py` puts them in order."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from charts import bars, curve, matrix
from checkpoints import read_json
from labels import EXPR, Task
from made_of import described, read_record
from page import data_url, details, element, paragraph, preformatted, section, shown, table, text
from pictures import read_log

NOTHING = (math.nan, math.nan)
TITLES = {"va": "Valence and arousal", "expr": "Expressions", "au": "Action units"}
MEANING = {
    "va": "CCC, the concordance correlation coefficient, is 1 where prediction and label are the same curve, "
          "and 0 where they have nothing to do with each other. Chance is the best constant prediction: it "
          "scores 0.",
    "expr": "F1 of a class is 1 if it is found always, and only where it is labelled. Macro F1 is the mean "
            "over the eight classes, so a rare class counts as much as a frequent one. Chance is the best "
            "constant prediction: always the most frequent class.",
    "au": "F1 of an action unit is 1 if it is found always, and only where it is labelled. The score is the "
          "mean over the twelve. Chance is the best constant prediction: every action unit always present."}
TAKEN = {
    "va": ("Labels and predictions", "Mean and deviation of both over all labelled frames, and their "
           "correlation. Correlation forgives a wrong mean or deviation; CCC does not."),
    "expr": ("What is taken for what", "A row per labelled class, a column per predicted class: frames, and "
             "their share of the row. A perfect model has all its frames on the diagonal."),
    "au": ("Right and wrong frames", "TN, TP: rightly told as absent and as present; FP: told, but not "
           "labelled; FN: labelled, but missed. Precision is TP / (TP + FP), recall TP / (TP + FN).")}
# Columns of log.csv, in the order shown.
COLUMNS = {"loss": "loss", "score": "validation score", "val_f1": "validation macro F1",
           "lr": "learning rate", "gradient_norm": "norm of the gradient", "seconds": "time per epoch"}
UNITS = {"pretrain": "mean squared error", "finetune": "nats", "va": "2 − CCC − CCC", "expr": "nats",
         "au": "nats"}                                                               # of the loss


class Finished(NamedTuple):
    """A finished task: its folder, what it has written, and its predicted validation videos."""
    task: Task
    folder: Path
    metrics: dict
    examples: dict             # {video: report_examples.Example}; empty if they could not be predicted
    problem: str               # why not
    unseen: float              # the score on videos of which the ViT has seen no scene; NaN if there is none


# ---- Scores

def between(interval) -> str:
    """[low, high] as text."""
    return f"{shown(interval[0])} to {shown(interval[1])}" if interval else "–"


def summary(tasks: list[Finished]) -> str:
    """A tile per task: its score, how sure it is, and chance."""
    tiles = []
    for found in tasks:
        m = found.metrics
        about = f"95 %: {between(m.get('score_interval'))} · chance {shown(m.get('chance'))}"
        tiles.append(element("div", text(f"{TITLES[found.task.name]}, {found.task.metric.name}"),
                             element("b", text(shown(m.get("score")))),
                             element("span", text(about), cls="soft"), cls="card tile"))
    return element("div", *tiles, cls="tiles")


def rows_of(found: Finished) -> list[tuple]:
    """(name, score, interval or None, chance, [labelled frames, of how many] or None) of each output, and
    last of the mean."""
    m, outputs = found.metrics, found.metrics.get("outputs", {})
    rows = []
    for name in found.task.outputs:
        of = outputs.get(name, {})
        rows.append((name, m.get(name), of.get("interval"), of.get("chance"), of.get("frames")))
    return [*rows, ("mean", m.get("score"), m.get("score_interval"), m.get("chance"), None)]


def table_of_scores(found: Finished, fold: int) -> str:
    """Each output's score beside chance and, where they can be compared, the paper's and the baseline's."""
    task, comparable = found.task, found.metrics.get("comparable", False)
    header, rows = ["", task.metric.name, "95 % interval", "chance", "labelled frames"], []
    for name, score, interval, chance, frames in rows_of(found):
        labelled, whole = frames or (None, None)
        among = f" of {shown(whole)}" if whole != labelled else ""
        rows.append([name, shown(score), between(interval), shown(chance),
                     "" if name == "mean" else shown(labelled) + among])
        if comparable:
            rows[-1] += [shown(task.paper[name][fold] if name in task.paper else None),
                         shown(task.baseline.get(name) if fold == 0 else None)]
    return table(header + (["paper", "baseline"] if comparable else []), rows, last=True)


def score_bars(found: Finished) -> str:
    """The same as a picture."""
    rows = [(name, math.nan if score is None else score, *(interval or NOTHING),
             math.nan if chance is None else chance)
            for name, score, interval, chance, _ in rows_of(found)]
    drawn = bars(f"{TITLES[found.task.name]}: the score of each output", rows)
    return element("figure", drawn, element("figcaption", text(
        "bar: score · line with ends: 95 % interval · diamond: chance")))


def about_score(found: Finished) -> str:
    """Which videos the score is of, and what makes it too high."""
    m = found.metrics
    words = [f"{shown(m.get('validation_videos'))} validation videos"
             + (f"; {m['data']}" if m.get("data") else "")]
    if m.get("seen_videos"):
        more = f"; on the others it is {found.unseen:.3f}" if math.isfinite(found.unseen) else ""
        words.append(f"The ViT was fine-tuned on scenes of {shown(m['seen_videos'])} of them, so the score "
                     f"is too high{more}")
    if m.get("left_out"):
        words.append("Left out: " + ", ".join(f"{name} ({why})" for name, why in m["left_out"].items()))
    return " ".join(f"{sentence}." for sentence in words)


def scores(found: Finished, fold: int) -> str:
    """One task's scores: what they mean, the table and the bars, what was taken for what."""
    task, m = found.task, found.metrics
    parts = [element("h3", text(f"{TITLES[task.name]}: {task.metric.name}")),
             paragraph(MEANING[task.name]), paragraph(about_score(found), "soft"),
             element("div", table_of_scores(found, fold), score_bars(found), cls="pair")]
    if m.get("confusion"):
        title, words = TAKEN[task.name]
        if task is EXPR:
            drawn = matrix("Frames by labelled and predicted class", m["confusion"], task.outputs)
            taken = element("div", drawn, cls="wide")
        else:
            rows = [[name, *map(shown, row)] for name, row in zip(task.outputs, m["confusion"])]
            taken = table(["", *m["confusion_columns"]], rows)
        parts += [element("h3", text(title)), paragraph(words), taken]
    return "".join(parts)


def scores_section(tasks: list[Finished], fold: int) -> str:
    """The scores of all finished tasks."""
    words = ("On the validation videos, each labelled frame once. The 95 % interval says how much the score "
             "would move with other videos of this kind. Two runs whose intervals overlap may still differ: "
             "evaluate.py --against compares them on the same videos.")
    return section("scores", "Scores", paragraph(words), *(scores(found, fold) for found in tasks))


# ---- Training

def reconstructions(folder: Path) -> str:
    """The sheet that pre-training has drawn; "" if there is none."""
    path = folder / "reconstruction.png"
    if not path.exists():
        return ""
    try:
        with Image.open(path) as picture:
            picture.verify()
            width, height = picture.size
        sheet = element("img", src=data_url(path.read_bytes(), "png"), cls="sheet", width=width,
                        height=height, alt="rows of faces: original, masked, reconstruction")
    except (OSError, ValueError, SyntaxError) as error:              # what Pillow raises for a broken PNG
        sheet = paragraph(f"{path}: not a readable picture ({error})")
    words = ("What pre-training has learnt. The middle row is all that the model sees, the bottom row what "
             "it makes of it.")
    return section("reconstruction", "Reconstructed faces", paragraph(words), sheet)


def stage_curves(title: str, folder: Path, unit: str, chance: dict) -> str:
    """The curves of one stage's log.csv, less those that are 0 throughout; "" without a log."""
    if not (folder / "log.csv").exists():
        return ""
    try:
        columns = read_log(folder / "log.csv")
    except ValueError as problem:
        return element("h3", text(title)) + paragraph(str(problem))
    epochs = columns.pop("epoch")
    zero = [name for name, values in columns.items() if not np.any(values)]
    order = dict.fromkeys(name for name in [*COLUMNS, *columns] if name in columns and name not in zero)
    units = {"loss": unit, "seconds": "s"}
    drawn = [curve(COLUMNS.get(name, name), epochs, columns[name], units.get(name, ""),
                   chance.get(name, math.nan)) for name in order]
    note = paragraph(f"0 in every epoch: {', '.join(zero)}", "soft") if zero else ""
    return element("h3", text(title)) + element("div", *drawn, cls="grid") + note


def curves_section(stages: dict[str, tuple[str, Path]], tasks: list[Finished]) -> str:
    """Training curves of pre-training, fine-tuning and all tasks; "" without any. stages: {stage: (title,
    folder)} of those that are finished."""
    parts = [stage_curves(*stages[stage], UNITS[stage], chance) for stage, chance in
             (("pretrain", {}), ("finetune", {"loss": EXPR.zero_loss})) if stage in stages]
    for found in tasks:
        chance = {"loss": found.task.zero_loss, "score": found.metrics.get("chance", math.nan)}
        parts.append(stage_curves(TITLES[found.task.name], found.folder, UNITS[found.task.name], chance))
    words = ("One point per epoch. Dashed: chance; for the loss, that of outputs that are all 0. The weights "
             "kept are those of the epoch with the best validation score, which makes that score a little "
             "optimistic.")
    return section("curves", "Training curves", paragraph(words), *parts) if any(parts) else ""


# ---- Settings

def settings_section(folders: dict[str, Path]) -> str:
    """The resolved settings, each text once; what each result was made of; all its numbers. folders: {title:
    folder} of what is finished."""
    files: dict[str, list[str]] = {}
    for title, folder in folders.items():
        if (folder / "config.yaml").exists():
            files.setdefault((folder / "config.yaml").read_text(errors="replace"), []).append(title)
    parts = [details(f"All settings of: {', '.join(titles)}", preformatted(words))
             for words, titles in files.items()]
    for title, folder in folders.items():
        record, metrics = read_record(folder), read_json(folder / "metrics.json")
        if record:
            parts.append(details(f"{title}: what it was made of", preformatted("\n".join(described(record)))))
        numbers = table(["", "value"], flat(metrics), words=True)
        parts.append(details(f"{title}: all numbers of its metrics.json", numbers))
    words = "To open with a click. In print, what is open."
    return section("settings", "Settings and numbers", paragraph(words), *parts)


def flat(value, name: str = "") -> list[list[str]]:
    """Each number and word of a JSON value with the way to it: [["outputs.AU1.chance", "0.425"], ...]."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in flat(item, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return [row for i, item in enumerate(value) for row in flat(item, f"{name}.{i}")]
    items = value if isinstance(value, list) else [value]
    return [[name, " ".join(shown(item) for item in items)]]
