"""Sections of the report about more runs than one: folds (folds.py) and ablations (ablation.py), if their
files are there."""

import math
from pathlib import Path

from charts import bars
from checkpoints import read_json
from labels import TASKS
from page import element, paragraph, section, shown, table, text
from report_parts import NOTHING, TITLES, between


def whole_or_named(path: Path, script: str, draw) -> str:
    """draw(what the file holds); "" without a file; a line that names it if it holds something else."""
    try:
        found = read_json(path)
        return draw(found) if found is not None else ""
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as problem:
        return paragraph(f"{path}: not what {script} writes ({type(problem).__name__}: {problem})")


# ---- Folds

def folds_section(run: Path) -> str:
    """Mean and deviation over folds, with an encoder per fold and with one for all; "" without either."""
    files = run / "folds.json", run / "folds_shared.json"
    parts = [whole_or_named(path, "folds.py", folds) for path in files]
    words = ("Fold 0 is the official split. In folds 1 to 4 each video is validated once. The deviation over "
             "folds says how much a score depends on which videos are validated.")
    return section("folds", "Folds", paragraph(words), *parts) if any(parts) else ""


def spread(mean: float, deviation: float) -> str:
    """ "0.694 ± 0.012" """
    return f"{shown(mean)} ± {shown(deviation)}"


def folds(found: dict) -> str:
    """A table and bars per task."""
    shared, comparable = found["encoder"] == "shared", found["comparable"]
    about = ("One encoder for all folds. It was fine-tuned on scenes that folds 1 to 4 validate, so their "
             "scores are too high; \"unseen\" is the score of the other videos alone."
             if shared else "An encoder for each fold, fine-tuned on its training videos.")
    parts = [paragraph(about), paragraph(f"Data: {found['data']}.", "soft")]
    for name, task in found["tasks"].items():
        rows = task["folds"]
        seen = any(row["seen_videos"] for row in rows)
        dimensions = [output for output in TASKS[name].paper if output != "mean"]      # valence and arousal
        header = ["fold", task["metric"], "95 % interval", *dimensions, *(["unseen"] if seen else []),
                  "chance", *(["paper", "baseline"] if comparable else [])]
        lines = []
        for row in rows:
            lines.append([shown(row["fold"]), shown(row["score"]), between(row["interval"]),
                          *(shown(row["outputs"][output]) for output in dimensions),
                          *([shown(row["unseen"])] if seen else []), shown(row["chance"])])
            lines[-1] += [shown(row["paper"]), shown(row["baseline"])] if comparable else []
        mean = ["mean", spread(task["mean"], task["deviation"]), *[""] * (len(header) - 2)]
        if comparable:
            mean[-2] = spread(task["paper_mean"], task["paper_deviation"])
        lines.append(mean)
        drawn = bars(f"{TITLES[name]}: the score of each fold",
                     [(f"fold {row['fold']}", row["score"], *(row["interval"] or NOTHING), row["chance"])
                      for row in rows])
        parts += [element("h3", text(TITLES[name] + (", one encoder" if shared else ""))),
                  element("div", table(header, lines, last=True), element("figure", drawn), cls="pair")]
    return "".join(parts)


# ---- Ablations

def ablation_section(out: Path, run: str) -> str:
    """What each part is worth, if the file in the folder of all runs is about this one."""
    def draw(found):
        return ablation(found) if found["run"] == run else ""
    part = whole_or_named(out / "ablation.json", "ablation.py", draw)
    return section("ablation", "What each part is worth", part) if part else ""


def ablation(found: dict) -> str:
    """A table of scores, and a picture of the differences per task."""
    first, *others = found["rows"]
    tasks = [name for name in TASKS if name in first["tasks"]]
    seeds = ", ".join(map(str, found["seeds"]))
    rows = [[row["title"], *(spread(row["tasks"][name]["mean"], row["tasks"][name]["deviation"])
                             for name in tasks)] for row in found["rows"]]
    parts = [paragraph(f"A row leaves one part out. Mean ± deviation over seeds {seeds}."),
             table(["left out", *(TITLES[name] for name in tasks)], rows), element("h3", text("Differences")),
             paragraph("The score without a part less that of the whole system, with its 95 % interval over "
                       "the same validation videos. Where the line crosses 0, these videos do not tell "
                       "whether the part helps.")]
    for name in tasks:
        cells = [(row["title"], row["tasks"][name]) for row in others]
        lines = [[title, shown(cell["difference"]), between(cell["interval"])] for title, cell in cells]
        drawn = bars(f"{TITLES[name]}: difference to the whole system",
                     [(title, cell["difference"], *(cell["interval"] or NOTHING), math.nan)
                      for title, cell in cells], most=0.0)
        parts += [element("h3", text(TITLES[name])), element(
            "div", table(["left out", "difference", "95 % interval"], lines), element("figure", drawn),
            cls="pair")]
    return "".join(parts)
