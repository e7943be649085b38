"""report.html of a small finished run, read as a browser reads it: every number is there, nothing is loaded,
what is missing is named."""

import contextlib
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as etree
from argparse import Namespace
from html import unescape
from unittest import mock

import numpy as np
import pytest
import torch

import report
import stages
from distributed import Team
from labels import AU, EXPR, TASKS, VA
from page import shown
from report_examples import Faces
from report_parts import Finished, about_score, flat, score_bars, table_of_scores
from report_timelines import timeline
from test_report_examples import example
from test_page import Reader

EVIL = "<script>alert(1)<script>&amp;\"'"                     # as the name of a folder, so without a slash
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ONE_EPOCH = ["--set", "task.epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All tasks trained for one epoch on random features; one validation video has an evil name. -> folder"""
    folder = tmp_path_factory.mktemp("report")
    films = {**stages.FILMS, EVIL: stages.Film("Validation_Set", 33, list(range(2, 30)), (5,))}
    with mock.patch.object(stages, "FILMS", films):
        stages.write(folder)
    for task in TASKS:
        stages.start(folder, "train_task.py", "--task", task, *ONE_EPOCH)
    return folder


def make(folder, *arguments) -> str:
    """The page that the command writes."""
    said = stages.start(folder, "report.py", *ONE_EPOCH, "--out", "r.html", *arguments)
    assert re.fullmatch(r"r\.html: \d+\.\d MB\n", said)
    return (folder / "r.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(run):
    return make(run, "--videos", EVIL, "6")


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, with the same data, to be damaged."""
    folder = tmp_path / "copy"
    shutil.copytree(run / "runs", folder / "runs")
    for name in ("tiny.yaml", "frames", "labels", "faces"):
        (folder / name).symlink_to(run / name)
    return folder


def refused(folder, capsys, *arguments) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as end:
        stages.start(folder, "report.py", *ONE_EPOCH, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[0].startswith("error: ") and "Traceback" not in lines[-1]
    return lines[0]


def table_rows(markup: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr.*?</tr>", markup)]


# ---- What stands in it

def leaves(value):
    """Every number in a JSON value."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def test_every_number_of_every_metrics_json_is_in_the_report(run, page):
    words = set(" ".join(Reader(page).texts).split())
    for path in (run / "runs/tiny").glob("*/metrics.json"):
        numbers = list(leaves(json.loads(path.read_text())))
        assert all(shown(number) in words for number in numbers), path
        assert len(numbers) > 10 or "task" not in str(path)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_each_score_stands_beside_its_own_interval_chance_and_frames(run, page, task):
    m = json.loads((run / f"runs/tiny/task_{task.name}/metrics.json").read_text())
    rows = table_rows(page)
    for name in task.outputs:
        of = m["outputs"][name]
        (low, high), (part, whole) = of["interval"], of["frames"]
        frames = f"{part}" if part == whole else f"{part} of {whole}"
        assert [name, f"{m[name]:.3f}", f"{low:.3f} to {high:.3f}", f"{of['chance']:.3f}", frames] in rows
    low, high = m["score_interval"]
    assert ["mean", f"{m['score']:.3f}", f"{low:.3f} to {high:.3f}", f"{m['chance']:.3f}", ""] in rows
    tile = f"<b>{m['score']:.3f}</b>"
    assert page.count(tile) >= 1 and f"95 %: {low:.3f} to {high:.3f} · chance {m['chance']:.3f}" in page


def test_the_confusion_matrix_is_that_of_metrics_json(run, page):
    m = json.loads((run / "runs/tiny/task_expr/metrics.json").read_text())
    charts = re.findall(r"<svg.*?</svg>", page)
    svg = next(chart for chart in charts if "by labelled and predicted class" in chart)
    cells = [mark.text for mark in etree.fromstring(svg).iter("text") if mark.get("class") == "count"]
    assert cells[::2] == [f"{count:,}" for row in m["confusion"] for count in row]
    for task in (VA, AU):
        m = json.loads((run / f"runs/tiny/task_{task.name}/metrics.json").read_text())
        for name, row in zip(task.outputs, m["confusion"]):
            assert [name, *map(shown, row)] in table_rows(page)
        assert ["", *m["confusion_columns"]] in table_rows(page)


def test_a_video_with_a_script_for_a_name_stays_text(page):
    found = Reader(page)
    assert not {"script", "iframe", "object", "link", "base"} & {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert EVIL in found.texts and any(f"of {EVIL}:" in (attributes.get("aria-label") or "")
                                       for _, attributes in found.tags)


def test_the_page_loads_nothing(page):
    for tag, attributes in Reader(page).tags:
        for name in ("src", "href", "data", "srcset", "action", "poster", "xlink:href"):
            inside = ("#", "data:image/png;", "data:image/jpeg;")
            assert attributes.get(name, "#").startswith(inside), (tag, name)
    assert "url(" not in page and "@import" not in page and "http" not in page


def test_every_chart_is_well_formed_and_has_a_title(page):
    charts = [etree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert len(charts) > 60
    for chart in charts:
        assert chart.get("aria-hidden") or chart[0].tag == "title" and chart[0].text
        assert "nan" not in etree.tostring(chart, "unicode").lower().replace("aria-hidden", "")


def test_every_link_leads_to_a_section(page):
    found = Reader(page).tags
    links = [attributes["href"][1:] for tag, attributes in found if tag == "a"]
    assert links == [attributes["id"] for tag, attributes in found if tag == "section"] != []


def test_the_wanted_videos_are_shown_for_all_their_tasks_and_the_others_are_listed(page):
    assert [unescape(title) for title in re.findall("<article><h3>(.*?)</h3>", page)] == [EVIL, "6"]
    words = Reader(page).texts
    assert sum(word.startswith("its own score: va ") for word in words) == 2
    rows = table_rows(page)
    assert {row[0] for row in rows if row[0] in (EVIL, "6", "7")} == {EVIL, "6", "7"}
    assert page.count('class="ticks"') == 2 * 3


def test_settings_and_what_it_was_made_of_are_there(run, page):
    words = "".join(Reader(page).texts)
    assert (run / "runs/tiny/task_va/config.yaml").read_text() in words
    assert "task_va" in words and "pretrain (checksum" in words
    assert "What is missing" not in words


def test_of_several_processes_one_writes_and_waits_for_none(run, page, tmp_path):
    options = Namespace(out=str(tmp_path / "r.html"), videos=[EVIL, "6"])
    with contextlib.chdir(run):
        report.main(stages.settings(run, "task.epochs=1"), Team(1, 2, torch.device("cpu")), options)
        assert not (tmp_path / "r.html").exists()
        report.main(stages.settings(run, "task.epochs=1"), Team(0, 2, torch.device("cpu")), options)
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page


# ---- What may be missing

def test_without_tasks_or_stages_the_report_names_them_and_their_commands(copy):
    for stage in ("task_va", "task_au", "pretrain"):
        shutil.rmtree(copy / "runs/tiny" / stage)
    markup = make(copy)
    rows = {row[0]: row[1] for row in table_rows(markup) if len(row) == 2}
    assert rows["Action units"].endswith("train_task.py --task au --config tiny.yaml --set task.epochs=1")
    assert "--task va" in rows["Valence and arousal"] and "train_pretrain.py" in rows["Pre-training"]
    assert "Expressions" not in rows and "Reconstructed faces" not in markup
    shutil.rmtree(copy / "runs/tiny/task_expr")
    markup = make(copy)
    assert [title for _, title in report.headings(markup)] == ["What is missing", "Settings and numbers"]


def test_a_run_of_a_mistyped_name_has_no_report_though_its_base_has_stages(copy, capsys):
    assert "runs/tyny: no stage is finished" in refused(copy, capsys, "--set", "run.name=tyny", "--set",
                                                        "run.base=tiny")
    assert not (copy / "runs/tyny").exists()


def test_nothing_finished_is_one_refusal(copy, capsys):
    shutil.rmtree(copy / "runs")
    assert re.fullmatch(r"error: runs/tiny: no stage is finished, so .*; begin with: python \S*train_task.py "
                        r"--task au --config tiny.yaml --set task.epochs=1", refused(copy, capsys))


def test_bad_options_are_refused(run, copy, capsys):
    assert "--out: runs is a folder" in refused(run, capsys, "--out", "runs")
    assert "'8' is none of the 3 predicted" in refused(run, capsys, "--videos", "6", "8")
    for task in TASKS:
        shutil.rmtree(copy / f"runs/tiny/task_{task}")
    assert "no task is finished" in refused(copy, capsys, "--videos", "6")


def test_without_features_the_scores_are_still_there(copy):
    shutil.rmtree(copy / "runs/tiny/features")
    words = Reader(make(copy)).texts
    assert sum("not shown." in word and "features" in word for word in words) == 3
    assert "The worst segments" not in words and "Scores" in words and "95 % interval" in words


def test_without_frames_the_videos_are_shown_without_faces(copy):
    (copy / "frames").unlink()
    markup = make(copy)
    assert "Without faces: data.frames: frames is no folder" in markup and "image/jpeg" not in markup
    assert markup.count('class="strip"') > 20


def test_damaged_logs_and_pictures_are_named(copy):
    (copy / "runs/tiny/task_au/log.csv").write_text("epoch,loss\n1,x\n")
    (copy / "runs/tiny/pretrain/reconstruction.png").write_bytes(b"\x89PNG no picture")
    words = " ".join(Reader(make(copy)).texts)
    assert "log.csv: not the log of a run" in words and "reconstruction.png: not a readable picture" in words


def test_numbers_of_an_earlier_version_and_of_one_video_are_shown_as_far_as_they_go():
    old = Finished(AU, "", {"score": 0.5, "chance": 0.3, "AU1": 0.25}, {}, "", np.nan)
    rows = table_rows(table_of_scores(old, 0))
    assert rows[0] == ["", "mean F1", "95 % interval", "chance", "labelled frames"]
    assert rows[1] == ["AU1", "0.250", "–", "–", "–"] and rows[-1] == ["mean", "0.500", "–", "0.300", ""]
    etree.fromstring(re.search("<svg.*</svg>", score_bars(old))[0])
    one = {"outputs": {"valence": {"interval": None, "chance": 0.0, "frames": [3, 3]}}, "valence": -0.1,
           "comparable": True}
    rows = table_rows(table_of_scores(Finished(VA, "", one, {}, "", np.nan), 2))
    assert rows[1] == ["valence", "-0.100", "–", "0.000", "3", "0.493", "–"]


def test_a_score_on_seen_scenes_is_called_too_high():
    m = {"validation_videos": 9, "seen_videos": 2, "left_out": {"ghost": "no labels"}, "data": "Aff-Wild2"}
    assert about_score(Finished(VA, "", m, {}, "", 0.25)) == (
        "9 validation videos; Aff-Wild2. The ViT was fine-tuned on scenes of 2 of them, so the score is too "
        "high; on the others it is 0.250. Left out: ghost (no labels).")


def test_numbers_are_listed_with_the_way_to_them():
    assert flat({"a": 1, "b": {"c": [0.5, None]}, "d": [[1, 2], [3, 4]], "e": {}, "f": True}) == [
        ["a", "1"], ["b.c", "0.500 –"], ["d.0", "1 2"], ["d.1", "3 4"], ["f", "yes"]]


# ---- Long and short videos

@pytest.mark.parametrize("T", [1, 47_434])
def test_the_timeline_of_a_video_of_any_length_is_small(T):
    rng = np.random.default_rng(0)
    examples = [example(task, "v", T=T, seed=1, known=0.9) for task in (VA, EXPR, AU)]
    examples[0] = examples[0]._replace(labels=np.full((T, 2), np.nan), values=rng.uniform(-1, 1, (T, 2)))
    markup = timeline("best", examples, Faces([]))
    Reader(markup)
    assert len(markup) < 300_000
    assert all(etree.fromstring(svg) is not None for svg in re.findall(r"<svg.*?</svg>", markup))


# ---- A browser

def test_it_opens_in_a_browser_without_a_console_error(page, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    ends = tmp_path / "r.html", tmp_path / "broken.html"
    ends[0].write_text(page, encoding="utf-8")
    ends[1].write_text("<script>nowhere()</script>")          # to see that errors are seen
    said = []
    for path in ends:
        opened = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path / path.stem}", "--enable-logging=stderr", "--dump-dom",
             path.as_uri()],
            capture_output=True, text=True, timeout=60)
        said.append("CONSOLE" in opened.stderr)
        assert opened.returncode == 0
    assert said == [False, True]
