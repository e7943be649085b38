"""One page about a finished run: report.html, in one file that needs no network and no script.

    python report.py                                       # the demo's: runs/demo/report.html
    python report.py --config my.yaml --out report.html
    python report.py --videos 10-30-1280x720 video5_3      # these, not the best, median and worst one

Scores with intervals, folds and ablations if there are any, the confusion matrix, timelines of some
validation videos, the worst segments with their frames, reconstructed faces, training curves, settings. What
is not finished is named. Scores are read from what the stages have written; the videos are predicted anew,
from their features.

In this order: what there is · sections about videos · the script. The other sections: `report_parts.py` and
`report_runs.py`.
"""

import math
from pathlib import Path

import numpy as np

from checkpoints import read_json, write_text
from config import from_command_line
from distributed import Team, launch
from labels import TASKS, Task
from made_of import command, finished, place
from page import details, element, headings, page, paragraph, section, shown, table, text
from report_examples import Faces, chosen, predicted, worst_segments
from report_parts import (TITLES, Finished, curves_section, reconstructions, scores_section, settings_section,
                          summary)
from report_runs import ablation_section, folds_section
from report_timelines import legend, segment_card, timeline
from scoring import check_features, check_scenes, find_features, load, stage_of, unseen
from segments import open_videos
from splits import split

STAGES = {"pretrain": ("Pre-training", "train_pretrain.py"), "finetune": ("Fine-tuning", "train_finetune.py"),
          "features": ("Features", "extract_features.py")}


# ---- What there is

def read_task(task: Task, config, team) -> Finished:
    """A finished task, with its validation videos predicted if their features and labels are there."""
    folder = config.folder(stage_of(config, task))
    metrics, path = read_json(folder / "metrics.json"), folder / "best.pt"
    try:
        trained = load(path, config, task, team)
        features, origin = find_features(trained.config, team)
        _, files = split(config.data.labels, task, config.task.fold)
        videos, _, _ = open_videos(files, features, task)
        check_features(path, trained.record, origin)
        check_scenes(path, trained.record, videos)
        examples = {video.name: predicted(trained, video) for video in videos}
    except (ValueError, OSError) as problem:
        return Finished(task, folder, metrics, {}, str(problem), math.nan)
    sums = np.stack([example.sums for example in examples.values()])                    # (videos, ...)
    new = unseen(examples, origin)
    score = float(task.metric.score(sums[new].sum(axis=0)).mean()) if new.any() else math.nan
    return Finished(task, folder, metrics, examples, "", score)


def missing(config, stages, tasks: list[Finished]) -> str:
    """What the run lacks, each with the command that makes it; "" if it lacks nothing."""
    rows = [(title, script) for stage, (title, script) in STAGES.items() if stage not in stages]
    rows += [(TITLES[task.name], f"train_task.py --task {task.name}")
             for task in TASKS.values() if task not in [found.task for found in tasks]]
    cells = [[title, command(script, config)] for title, script in rows]
    commands = table(["not finished", "made by"], cells, words=True)
    return section("missing", "What is missing", commands) if rows else ""


# ---- Videos

def videos_section(tasks: list[Finished], config, wanted) -> str:
    """Timelines of some validation videos, and the worst segments."""
    parts = [paragraph(f"{TITLES[found.task.name]}: not shown. {found.problem}") for found in tasks
             if found.problem]
    examples = {found.task.name: found.examples for found in tasks if found.examples}
    if not examples:
        return section("videos", "Videos", *parts)
    shows, faces = chosen(examples, config.segments.window, wanted), Faces(config.data.frames)
    if faces.problem:
        parts.append(paragraph(f"Without faces: {faces.problem}", "soft"))
    parts.append(paragraph(
        "Label against prediction. A video's own score is the mean over the outputs that are labelled in it. "
        "It is unfair to calm videos: where a label hardly moves, its CCC is near 0, however close the "
        "prediction."))
    parts.append(legend())
    for why, name in shows:
        parts.append(timeline(why, [videos[name] for videos in examples.values() if name in videos], faces))
    parts.append(all_videos(examples))
    return section("videos", "Videos", *parts) + worst_section(examples, config.segments, faces)


def all_videos(examples) -> str:
    """The own scores of every validation video, the best first."""
    rows = []
    for name in {name for videos in examples.values() for name in videos}:
        own = [videos[name].score if name in videos else math.nan for videos in examples.values()]
        known = [score for score in own if math.isfinite(score)]
        mean = sum(known) / len(known) if known else math.nan
        rows.append([name, *own, mean])
    rows.sort(key=lambda row: (-row[-1] if math.isfinite(row[-1]) else math.inf, row[0]))
    rows = [[name, *map(shown, numbers)] for name, *numbers in rows]
    return details(f"The own scores of all {len(rows)} validation videos",
                   table(["video", *(TITLES[task] for task in examples), "mean"], rows))


def worst_section(examples, s, faces: Faces) -> str:
    """The worst segments of each task."""
    cards = []
    for task, videos in examples.items():
        worst = worst_segments(videos.values(), s.window, s.stride)
        inside = [segment_card(segment, faces) for segment in worst]
        cards += [element("h3", text(TITLES[task])), element("div", *inside, cls="grid") if inside else
                  paragraph("No segment has labels in half of its frames.")]
    return section("worst", "The worst segments", paragraph(
        "The five segments of each task with the largest error, of those with labels in at least half of "
        "their frames. Look for what they share: blur, a turned head, a hand before the face, a label that "
        "is wrong. Below each face stands the number of its frame."), *cards)


# ---- The script

def main(config, team, options):
    """Write the report of a run. Raises ValueError if none of its stages is finished."""
    if team.rank:
        return
    team = Team(0, 1, team.device)                     # the others have nothing to do, so none is waited for
    run = Path(config.run.out) / config.run.name
    out = Path(options.out or run / "report.html")
    if out.is_dir():
        raise ValueError(f"--out: {out} is a folder; expected the name of a file, like report.html")
    stages = {stage: (title, place(config, stage)) for stage, (title, _) in STAGES.items()
              if finished(place(config, stage))}
    tasks = [read_task(task, config, team) for task in TASKS.values()
             if finished(config.folder(stage_of(config, task)))]
    if not run.exists() or not stages and not tasks:                 # the stages may be those of run.base
        raise ValueError(f"{run}: no stage is finished, so there is nothing to report; begin with: "
                         + command("train_task.py --task au", config))
    if options.videos and not any(found.examples for found in tasks):
        raise ValueError("--videos: no video can be shown, for "
                         + ("; ".join(found.problem for found in tasks) or "no task is finished"))
    parts = [missing(config, stages, tasks)]
    if tasks:
        parts.append(scores_section(tasks, config.task.fold))
    parts += [folds_section(run), ablation_section(Path(config.run.out), config.run.name)]
    if tasks:
        parts.append(videos_section(tasks, config, options.videos))
    if "pretrain" in stages:
        parts.append(reconstructions(stages["pretrain"][1]))
    parts += [curves_section(stages, tasks),
              settings_section({**dict(stages.values()),
                                **{TITLES[found.task.name]: found.folder for found in tasks}})]
    words = whole(run, config, tasks, "".join(parts))
    write_text(out, words)
    team.say(f"{out}: {len(words.encode()) / 1e6:.1f} MB")


def whole(run: Path, config, tasks, body: str) -> str:
    """The page: heading, summary, links to its sections, and these."""
    data = "synthetic faces" if config.data.synthetic else f"the videos of {config.data.labels}"
    fold = f", fold {config.task.fold}" if config.task.fold else ""
    links = [element("a", title, href=f"#{name}") for name, title in headings(body)]
    heading = element("h1", text(f"{run.name}{fold}")) + paragraph(f"Report of {run}, on {data}.", "soft")
    return page(f"{run.name}{fold}: report", heading, summary(tasks), element("nav", *links), body)


if __name__ == "__main__":
    config, options = from_command_line(
        __doc__, out={"default": "", "metavar": "FILE", "help": "default: runs/<run>/report.html"},
        videos={"nargs": "+", "default": [], "metavar": "NAME", "help": "the validation videos to show"})
    launch(main, config, options)
