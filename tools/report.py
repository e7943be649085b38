"""A run as one page: report.html, in one file that needs no network and no script (docs/demo.md).

    python -m tools.report                                   # the demo's: runs/demo/report.html
    python -m tools.report --config my.yaml --out report.html --videos 10-30-1280x720 video6_3

All of it is read from what the stages have written. What is not finished or damaged is named.
"""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data import segments, some_faces
from engine.checkpoints import read_json, write_text
from engine.config import from_command_line, nearest, print_all
from images import find_videos
from labels import TASKS, in_units, read_labels, split, targets
from metrics import confusion
from pictures import FACE, draw_video
from pipeline import STAGES, command, finished, folder

MEANING = ("CCC is 1 where prediction and label are one curve, 0 where they are unrelated. F1 is 1 for what"
           " is found always, and only where it is labelled. Chance is the best constant prediction.")
HEAD = """<meta charset="utf-8"/><meta name="viewport" content="width=device-width"/><style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 73rem; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-top: 2px solid; } a { color: inherit; margin-right: 1rem; }
img { max-width: 100%; height: auto; } table { border-spacing: 0; } pre { font-size: .8rem; }
div, pre { overflow-x: auto; overflow-wrap: normal; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #8888; }
@media print { :root { color-scheme: light; } nav, details:not([open]) { display: none; }
    pre { white-space: pre-wrap; } img, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
</style>"""


class Markup(str):
    """Text that is markup already. All other text is escaped by `tag`: it is shown, never obeyed."""


def tag(name: str, /, *inside, **attributes) -> Markup:
    """<name attributes>inside</name>; a number has three decimals, None is nothing."""
    words = "".join(f' {key}="{html.escape(str(value))}"' for key, value in attributes.items())
    texts = [f"{item:.3f}" if isinstance(item, float) else item for item in inside if item is not None]
    texts = [item if isinstance(item, Markup) else html.escape(str(item)) for item in texts]
    return Markup(f"<{name}{words}/>" if name == "img" else f"<{name}{words}>{''.join(texts)}</{name}>")


def table(header, rows) -> list[Markup]:
    """Rows below a header; nothing if there are none."""
    lines = [tag("tr", *[tag("th", cell) for cell in header])]
    lines += [tag("tr", *[tag("td", cell) for cell in row]) for row in rows]
    return [tag("div", tag("table", *lines))] if rows else []


def show(source) -> Markup:
    """An image, or a file of a run: a picture, or a text to fold away, of which a .txt is open."""
    if isinstance(source, Path) and source.suffix != ".png":
        text, is_open = tag("pre", source.read_text()), {"open": ""} if source.suffix == ".txt" else {}
        return tag("details", tag("summary", source), text, **is_open)
    image, file = Image.open(source) if isinstance(source, Path) else source, io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return tag("img", src=f"data:image/png;base64,{data}", alt=getattr(source, "name", ""))


def read_metrics(path, name: str, task) -> tuple:
    """Of a metrics.json: a row [stage, metric, score, interval, chance], and of a task what was taken for
    what, each in a list that may be empty: features have no score."""
    m = read_json(path)
    interval = "{:.3f} to {:.3f}".format(*m["score_interval"]) if m.get("score_interval") else "-"
    chance = m["chance"] if isinstance(m.get("chance"), float) else "-"
    rows = [[name, m.get("metric", key), m[key], interval, chance] for key in ("score", "loss") if key in m]
    return rows, [tag("pre", confusion(task, np.array(m["video_sums"])))] if task else []


def read_videos(path, task, config) -> dict[str, tuple]:
    """{video: (own score, values in units, labels)}, the last two (T, K): of classes 1 for the labelled one;
    NaN = not annotated. The own score is the mean over the outputs that are labelled in the video, because F1
    calls each class that does not occur a failure. Raises ValueError if the labels are not those scored."""
    found, files = {}, split(config.data.labels, task, config.task.fold)[1]
    for video, outputs in np.load(path).items():
        target, valid = targets(read_labels(files[video], task) if video in files else np.zeros(0), task)
        if len(target) != len(outputs):
            raise ValueError(f"{video}: {len(outputs)} frames were scored, but now {len(target)} have labels")
        sums = task.metric.count(outputs, target, valid)
        scores = task.metric.score(sums)[task.metric.labelled(sums)[:, 0] > 0]
        if task.one_class:
            target, valid = np.eye(len(task.outputs))[target], valid[:, None]      # (T,) -> (T, K), (T, 1)
        found[video] = (float(np.mean(scores)) if len(scores) else np.nan, in_units(outputs, task),
                        np.where(valid, target, np.nan))
    return found


def worst_segments(task, videos: dict, s, count: int = 5) -> list[tuple]:
    """(error, video, start, end, in words) of each video's worst segment, the worst first. The error is the
    root of the mean square of prediction less label. s: the section `segments`; half a window has labels."""
    found = []
    for video, (_, values, labels) in videos.items():
        gap, rows = np.ma.masked_invalid(values - labels), []                      # (T, K)
        for start, end in segments(len(gap), s.window, s.stride):
            if 2 * gap[start:end].count(axis=1).astype(bool).sum() >= s.window:
                mean = gap[start:end].mean(axis=0).filled(0)                       # (K,)
                words = [f"{task.outputs[k]} {abs(mean[k]):.2f} too {'high' if mean[k] > 0 else 'low'}"
                         for k in np.argsort(-abs(mean))[:2]]
                rows.append((float((gap[start:end] ** 2).mean() ** 0.5), video, start, end, ", ".join(words)))
        found += [max(rows)] if rows else []
    return sorted(found, reverse=True)[:count]


def page(title: str, about: str, sections: dict[str, list]) -> str:
    """The whole file. sections: {title: markup}; one without any is left out."""
    sections = {name: inside for name, inside in sections.items() if inside}
    links = [tag("a", name, href=f"#{name.split()[0]}") for name in sections]
    parts = [tag("section", tag("h2", name), *part, id=name.split()[0]) for name, part in sections.items()]
    body = tag("body", tag("h1", title), tag("p", about), tag("nav", *links), *parts)
    return "<!DOCTYPE html>\n" + tag("html", tag("head", tag("title", title), Markup(HEAD)), body, lang="en")


def main(config, options):
    """Write the page; yields where. Raises ValueError if no stage is finished or a video is unknown."""
    run, missing = Path(config.run.out) / config.run.name, []

    def part(make, source, *arguments):
        """make(source, *arguments); None, and a row of what is missing, if that is gone or damaged."""
        try:
            return make(source, *arguments)
        except Exception as problem:                       # a damaged file can raise anything
            missing.append([source, f"{type(problem).__name__}: {problem}"])

    def faces(video, first, last, count, size):
        numbers = np.linspace(first, last, count).round()
        return (part(some_faces, roots[video], numbers, size) if video in roots else None) or []

    roots = (part(find_videos, config.data.frames) or [{}])[0]
    summary, scores, trainings, videos, own, shown, worst = [], [], [], {}, {}, [], []
    for name, task in [*[(stage, None) for stage in STAGES if stage != "task"], *TASKS.items()]:
        place = folder("task" if task else name, config, task)
        if not finished(place):
            script = f"train_task --task {name}" if task else STAGES[name].script
            missing += [] if name in ("stills", "emma", "cotex") else [[name, command(script, config)]]
            continue                                       # nobody misses the second paper's
        rows, taken = part(read_metrics, place / "metrics.json", name, task) or ([], [])
        summary += rows
        files = ["reconstruction.png"] * (name == "pretrain") + ["curves.png"] * (name != "features")
        files += ["metrics.json", "config.yaml", "made_of.json"]
        trainings += [tag("h3", name), *[part(show, place / file) for file in files]]
        if task:
            scores += [tag("h3", name), part(show, place / "scores.txt"), *taken]
            videos[name] = part(read_videos, place / "predictions.npz", task, config) or {}
            for video, (score, _, _) in videos[name].items():
                own.setdefault(video, {})[name] = score
            for error, video, start, end, words in worst_segments(task, videos[name], config.segments):
                row = [show(Image.fromarray(face)) for _, face in faces(video, start + 1, end, 4, 64)]
                worst.append([name, video, f"{start + 1} to {end}", error, words, Markup("".join(row))])
    if not trainings:
        raise ValueError(f"{run}: no stage is finished; begin with: {command('train_pretrain', config)}")
    for video in options.videos:
        if video not in own:
            raise ValueError(f"--videos: {video!r} is none of {len(own)} scored videos{nearest(video, own)}")
    rows = [[video, *[of_video.get(name, np.nan) for name in videos]] for video, of_video in own.items()]
    rows.sort(key=lambda row: (np.isnan(row[1:]).any(), -np.mean(row[1:])))     # last, who lacks one
    full = [video for video, *of_video in rows if np.isfinite(of_video).all()]
    ends = {full[i]: why for i, why in ((-1, "worst"), (len(full) // 2, "median"), (0, "best")) if full}
    for video in options.videos or reversed(ends):
        note = "own score: " + ", ".join(f"{name} {score:.3f}" for name, score in own[video].items())
        values, labels = [{name: videos[name][video][k] for name in own[video]} for k in (1, 2)]
        some = faces(video, 1, max(map(len, values.values())), 11, FACE)
        shown += [tag("h3", f"{video}, the {ends[video]} one" if video in ends else video),
                  show(draw_video(video, values, labels, some, note=note))]
    shown += [tag("details", tag("summary", "All videos by own score"), *table(["video", *videos], rows))]
    texts = [part(show, path) for path in sorted(run.glob("*.txt"))]
    out = Path(options.out or run / "report.html")
    write_text(out, page(run.name, f"Made by python -m tools.report --config {config.words}", {
        "Summary": table(["stage", "metric", "score", "95 % interval", "chance"], summary),
        "Missing or damaged": table(["what", "made by, or what is wrong"], missing),
        "Scores": scores and [tag("p", MEANING), *scores], "Experiments": texts, "Videos": own and shown,
        "Worst segments": table(["task", "video", "frames", "error", "predicted", "faces"], worst),
        "Trainings and settings": trainings}))
    yield out


if __name__ == "__main__":
    print_all(main(*from_command_line(
        __doc__, out={"default": "", "metavar": "FILE", "help": "default: runs/<run>/report.html"},
        videos={"nargs": "+", "default": [], "metavar": "NAME", "help": "the validation videos to show"})))
